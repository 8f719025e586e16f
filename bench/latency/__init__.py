"""`bench TARGET`: from pixels and JPEG to logits, its stages and its peers."""
