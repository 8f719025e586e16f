"""Measurements: each script says what is inside its timed region."""
