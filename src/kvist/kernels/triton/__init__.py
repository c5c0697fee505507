"""On GPUs, portable: every recipe of the house."""
