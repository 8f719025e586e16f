"""`bench serve`: what a server takes under load, and what serving costs beyond the model."""
