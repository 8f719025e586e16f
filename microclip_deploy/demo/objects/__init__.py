"""Animals drawn by several artists, small and among clutter: where [FG] has something to find."""
