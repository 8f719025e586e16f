"""Class descriptions by a language model: asked for, checked, and kept with their origin."""
