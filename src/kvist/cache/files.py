"""A cache on disk: one safetensors file, its bookkeeping as JSON in the header. Written whole or not at all."""

