"""Normalised-cut saliency on ViT patch tokens: the definition and its implementations."""
