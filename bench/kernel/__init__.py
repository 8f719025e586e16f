"""`bench ncut`: the kernels of the normalised cut against eigensolvers."""
