"""Speed and memory, measured: contenders interleaved in one process, medians and ratios. Never part of the tests."""
