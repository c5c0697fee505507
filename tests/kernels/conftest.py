"""Triton's interpreter for the kernel tests: it is chosen when a kernel is defined, so their modules are imported here.

The variable is taken away again: it also tells `choose` to use Triton on a CPU, which only some tests want.
"""

import os
from unittest import mock

with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
    import triton.experimental.gluon  # noqa: F401  (the first launch imports it, and it must meet the same variable)

    import kvist.kernels.decode_triton
    import kvist.kernels.step_triton  # noqa: F401
