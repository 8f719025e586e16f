"""What a model is worth: accuracy, predictions, overlays and the report of a run."""
