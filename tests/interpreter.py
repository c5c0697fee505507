"""Where kernel tests run that can run on a GPU: KVIST_TEST_DEVICE=cuda, as `make gpu` sets it.

Everywhere else Triton's kernels run in its interpreter. That is chosen when a kernel is defined, so they are imported
here, and Triton before anything else imports it; the variable is taken away again, since it also tells `choose` to use
Triton on a CPU, which only some tests want.
"""

import os
from importlib.util import find_spec
from unittest import mock

DEVICE = os.environ.get("KVIST_TEST_DEVICE", "cpu")

if find_spec("triton") and DEVICE == "cpu":
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        import triton.experimental.gluon  # noqa: F401

        import kvist.kernels.triton.codec
        import kvist.kernels.triton.decode
        import kvist.kernels.triton.step  # noqa: F401
