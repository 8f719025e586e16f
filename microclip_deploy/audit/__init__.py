"""`audit`: how accurate two models are on unlabeled photos, from as few answers as settle it."""
