"""Ahead of time: what launches compile for a GPU that is not here.

Triton compiles a kernel when it is called, for what it is called with. Here calls are made as ever, with a driver in
place of the GPU's that names an architecture and launches nothing: what is compiled is what would run there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kvist.kernels.triton.unpack import PLAIN

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory of a block, by architecture


class _Driver:
    """What Triton asks of a driver when it launches."""

    def __init__(self, arch: int):
        self.arch, self.utils, self.launcher_cls = arch, self, lambda *source: lambda *launch: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # kernels are kept by device: these are not taken for those of a GPU

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch]}

    def load_binary(self, *binary: object) -> tuple:
        return None, None, 0, 0, 1024  # module, function, registers, spilled ones, most threads


@contextmanager
def absent(arch: int) -> Iterator[None]:
    """Launches within compile for sm_`arch` and do nothing; tensors may be of any device but CUDA, "meta" too.
    Raises RuntimeError where Triton is its interpreter, ValueError for an architecture that is not in `SHARED`."""
    if PLAIN:
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    if arch not in SHARED:
        raise ValueError(f"architectures are {', '.join(map(str, SHARED))}, found {arch}")
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver.set_active(None)  # the GPU's own is found again when it is asked for


def compiled(arch: int, kernel, run: Callable, *args, **options) -> list:
    """`kernel` as `run(*args, **options)` launches it on sm_`arch`: each variant, as Triton's `compile` returns it."""
    with absent(arch):
        kernel.device_caches.pop(f"sm_{arch}", None)  # of earlier calls
        run(*args, **options)
    return list(kernel.device_caches[f"sm_{arch}"][0].values())
