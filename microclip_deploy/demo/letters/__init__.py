"""Small letters that differ by one mark, each filling its image."""
