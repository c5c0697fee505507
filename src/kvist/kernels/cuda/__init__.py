"""On NVIDIA GPUs: the fast decode kernel, compiled at run time."""
