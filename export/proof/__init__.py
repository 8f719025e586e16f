"""The proof that an export equals the model: PyTorch against every graph, stage by stage."""
