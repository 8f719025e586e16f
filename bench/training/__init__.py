"""`bench adapt`: a training step and the loading of photos; and the ablations of the method."""
