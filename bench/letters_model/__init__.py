"""How the embedded CLIP model was made; nothing here runs for a user."""
