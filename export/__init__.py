"""Conversion of an adapted checkpoint to portable graphs."""
