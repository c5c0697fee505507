"""Measurements of the kernels, on a GPU and in machine code; `make gpu` runs them. No part of the wheel."""
