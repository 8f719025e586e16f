"""How well each rule of the cut finds the object, on composites whose true mask is known."""
