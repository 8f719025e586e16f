"""A model repository for Triton Inference Server, written from an export."""
