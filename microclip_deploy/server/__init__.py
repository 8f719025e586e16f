"""The HTTP server: what `microclip-deploy serve` runs."""
