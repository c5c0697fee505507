"""On NVIDIA GPUs: the fast decode kernel (split-KV), compiled at run time."""
