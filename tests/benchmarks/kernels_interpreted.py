"""The benchmarks' own Triton kernels run as those of `tests/interpreter.py` do: in the interpreter, without a GPU."""

import os
from importlib.util import find_spec
from unittest import mock

from interpreter import DEVICE

if find_spec("triton") and DEVICE == "cpu":
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        import benchmarks.angles_triton
        import benchmarks.split_triton  # noqa: F401
