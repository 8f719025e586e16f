"""How the tiny model of the objects benchmark was made, and what it can do before adaptation."""
