"""Who takes part in the kernel benchmark: torch's attention, FlashInfer, FlashAttention, our own fp16 kernel, ours.

A contender is made for a shape and leaves functions that do one decode step each, over data of their own, so that a
device's cache does not serve them. It carries what it must agree with, which is checked before it is timed.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import device_time, kernel_gate, kernel_storage
from benchmarks.device_time import copies_for
from benchmarks.kernel_storage import Shape

FP16, FP8, OURS = "fp16", "fp8", "kvist"
FLASHINFER_PAGE = 16
WORKSPACE = 128 << 20  # bytes, that FlashInfer asks for
FP8_TOLERANCE = 6e-2  # weights and queries of FP8 kernels have 3 bits of mantissa
BACKENDS = {SDPBackend.FLASH_ATTENTION: ("flash",), SDPBackend.CUDNN_ATTENTION: ("cudnn", "fmha", "sdpa")}
FLASH_INFER, FLASH_3, FLASH_2 = "flashinfer", "flash_attn_interface", "flash_attn"


@dataclass
class Runner:
    """turns: a decode step each, all the same but for where the data lie; expected (B, Hq, 1, D) fp32, of the first;
    nbytes: what a step must read; kernel: what serves it; must: words of which the name of a kernel
    that runs on the device must hold one."""

    name: str
    kind: str
    turns: list[Callable[[], Tensor]]
    expected: Tensor
    nbytes: int
    tolerance: float = kernel_gate.TOLERANCE
    kernel: str = ""
    must: tuple[str, ...] = ()

    def named(self) -> None:
        """See which kernel runs. Raises RuntimeError where it is not one that was asked for."""
        if self.must and self.expected.device.type == "cuda":
            self.kernel = device_time.kernel_of(self.turns[0], self.must)

    def error(self) -> float:
        """Of the first turn, in units of the largest output. Raises RuntimeError above the tolerance."""
        found = kernel_gate.error(self.turns[0](), self.expected)
        if not found <= self.tolerance:
            raise RuntimeError(f"error {found:.1e} of the largest output, at most {self.tolerance:.1e} are allowed")
        return found


@dataclass
class Plain:
    """Random fp16 keys and values (B, H, N, D) of a shape whose rows are alike, in copies; and queries."""

    shape: Shape
    query: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    scale: float

    @classmethod
    def make(cls, shape: Shape, device: torch.device, toy: bool) -> "Plain":
        dims = shape.batch, shape.heads, shape.length, shape.dim
        count = 1 if toy else copies_for(2 * shape.elements)
        pairs = [
            (
                torch.randn(dims, dtype=torch.float16, device=device),
                torch.randn(dims, dtype=torch.float16, device=device),
            )
            for _ in range(count)
        ]
        return cls(shape, kernel_storage.queries(shape, device), pairs, shape.dim**-0.5)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.pairs[0])

    @cached_property
    def expected(self) -> Tensor:
        return kernel_gate.over_tensors(self.query, *self.pairs[0], self.scale)

    @cached_property
    def tolerance(self) -> float:
        """What attention in fp16 is allowed to be off by."""
        half = kernel_gate.over_tensors(self.query, *self.pairs[0], self.scale, kernel_gate.rounded)
        return kernel_gate.limit(kernel_gate.error(half, self.expected))

    def contender(
        self, name: str, attend: Callable[[Tensor, Tensor, Tensor, float], Tensor], must: tuple[str, ...] = ()
    ) -> Runner:
        """One that takes these very tensors."""
        turns: list[Callable] = [partial(attend, self.query, *pair, self.scale) for pair in self.pairs]
        return Runner(name, FP16, turns, self.expected, self.nbytes, self.tolerance, name, must)


def _sdpa(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            query, keys, values, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )


def _split(plain: Plain) -> Runner:
    if plain.query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton runs on GPUs, or in its interpreter with TRITON_INTERPRET=1")
    from benchmarks.split_triton import attend

    return plain.contender("split-KV, Triton", attend)


def _flashinfer(plain: Plain, kind: str) -> Runner:
    """FlashInfer's decode over pages, which has split-KV at every batch."""
    import flashinfer  # pyright: ignore[reportMissingImports]

    shape, device = plain.shape, plain.query.device
    stored = torch.float16 if kind == FP16 else torch.float8_e4m3fn
    pages, length = -(-shape.length // FLASHINFER_PAGE), shape.length
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=True
    )
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * pages
    wrapper.plan(
        indptr,
        torch.arange(shape.batch * pages, dtype=torch.int32, device=device),
        torch.full((shape.batch,), length - (pages - 1) * FLASHINFER_PAGE, dtype=torch.int32, device=device),
        shape.query_heads,
        shape.heads,
        shape.dim,
        FLASHINFER_PAGE,
        q_data_type=torch.float16,
        kv_data_type=stored,
        sm_scale=plain.scale,
    )

    def paged(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, pages * FLASHINFER_PAGE - length)).transpose(1, 2)
        return x.reshape(shape.batch * pages, FLASHINFER_PAGE, shape.heads, shape.dim).to(stored)

    caches = [tuple(map(paged, pair)) for pair in plain.pairs]
    query = plain.query.squeeze(2)
    turns: list[Callable] = [lambda c=c: wrapper.run(query, c).view_as(plain.query) for c in caches]
    return _foreign("FlashInfer", plain, kind, turns, stored)


def _flash(plain: Plain, kind: str, module: str) -> Runner:
    """FlashAttention's own decode, 3 (Hopper) or 2."""
    name = "FlashAttention-3" if module == FLASH_3 else "FlashAttention-2"
    attend = importlib.import_module(module).flash_attn_with_kvcache
    stored = torch.float16 if kind == FP16 else torch.float8_e4m3fn
    query = plain.query.transpose(1, 2).to(stored)
    caches = [[x.transpose(1, 2).contiguous().to(stored) for x in pair] for pair in plain.pairs]

    def turn(keys: Tensor, values: Tensor) -> Tensor:
        out = attend(query, keys, values, softmax_scale=plain.scale, causal=False)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    turns: list[Callable] = [partial(turn, *cache) for cache in caches]
    return _foreign(name, plain, kind, turns, stored)


def _foreign(name: str, plain: Plain, kind: str, turns: list[Callable], stored: torch.dtype) -> Runner:
    expected, tolerance = plain.expected, plain.tolerance
    if kind == FP8:
        keys, values = (x.to(stored).float() for x in plain.pairs[0])
        expected, tolerance = kernel_gate.over_tensors(plain.query, keys, values, plain.scale), FP8_TOLERANCE
    nbytes = plain.nbytes * stored.itemsize // 2
    return Runner(f"{name}, {kind}", kind, turns, expected, nbytes, tolerance, name)


def half_precision(plain: Plain) -> Iterator[tuple[str, str, Callable[[], Runner]]]:
    """Every contender over fp16 or FP8 by name and kind, and how to make it; making one that cannot be had raises."""
    for backend, must in BACKENDS.items():
        name = f"torch SDPA, {backend.name.split('_')[0].lower()}"
        yield name, FP16, partial(plain.contender, name, partial(_sdpa, backend), must)
    yield "split-KV, Triton", FP16, partial(_split, plain)
    for kind in (FP16, FP8):
        yield f"FlashInfer, {kind}", kind, partial(_installed, FLASH_INFER, partial(_flashinfer, plain, kind))
        yield f"FlashAttention-3, {kind}", kind, partial(_installed, FLASH_3, partial(_flash, plain, kind, FLASH_3))
    yield "FlashAttention-2, fp16", FP16, partial(_installed, FLASH_2, partial(_flash, plain, FP16, FLASH_2))


def _installed(module: str, make: Callable[[], Runner]) -> Runner:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{module} is not installed")
    return make()


def ours(method: str, shape: Shape, device: torch.device, toy: bool) -> Runner:
    """A method of the house, through the layer and the view that a model's attention uses."""
    layer = kernel_storage.filled(method, shape, device)
    query, scale = kernel_storage.queries(shape, device), shape.dim**-0.5
    expected, nbytes = kernel_gate.over_tiles(layer, query, scale), kernel_storage.read(layer)
    half = kernel_gate.error(kernel_gate.over_tiles(layer, query, scale, kernel_gate.rounded), expected)
    layers = kernel_storage.twins(layer, 1 if toy else copies_for(nbytes))
    turns: list[Callable] = [partial(kernel_storage.step, each, query, scale) for each in layers]
    limit, served = kernel_gate.limit(half), kernel_storage.kernel(layer).name
    return Runner(f"kvist {method}", OURS, turns, expected, nbytes, limit, served)
