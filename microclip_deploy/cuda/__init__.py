"""The GPU path: every CUDA source and one launcher each, on arrays of CuPy and PyTorch."""
