"""Training: unlabeled photos -> views -> pseudo-labels -> adapted model."""
