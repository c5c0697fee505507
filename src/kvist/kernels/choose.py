"""(operation, traits, device) to an implementation, or to the reasons why only the reference serves."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

MOST_CELLS = 65535  # rows times KV heads of one launch
MOST_QUERIES = 8  # of a decode step: one token, or what speculative decoding checks at a time


@dataclass(frozen=True)
class Traits:
    """How one side is stored, as plain data: what a kernel may ask. `group` 0 is the whole head; `rank` and `rotary`
    are empty where there are no outliers and nothing was unrotated; `hadamard`: stored in the space of its rotation."""

    levels: str
    bits: int
    along: str
    group: int
    across_heads: bool
    range: str
    outliers: bool = False
    rank: str = ""
    rotary: str = ""
    hadamard: bool = False


class Constants(NamedTuple):
    """Numbers of a side that are the same for all its tokens; None where there are none.

    edges (2^b - 1,) between the points of a table, points (2^b,) on reading; scale and offset (H, D) of fixed ranges;
    frequencies (F,) of the rotary embedding that was undone, and its scaling. All fp32.
    """

    edges: Tensor | None
    points: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    frequencies: Tensor | None
    scaling: float


class Stored(NamedTuple):
    """One side of the packed pages: its pool arrays, page tables (B, pages) int32, and constants."""

    arrays: dict[str, Tensor]
    table: Tensor
    constants: Constants


class Exact(NamedTuple):
    """The exact tokens of one side: sinks (B, H, S, D); ring (B, H, C, D), position p behind the sinks in slot p mod C;
    pinned (B, H, P, D), or 0 slots of them."""

    sinks: Tensor
    ring: Tensor
    pinned: Tensor


class Decode(NamedTuple):
    """What else a decode step says. Tensors are on the device.

    state (B, 8) int32: sinks held, frontier of keys and of values, tokens behind the sinks, the position that page slot
    0 was rotated for, and unused ones. A packed token's slot is its position behind the sinks. skip (B, slots) bool:
    slots that the packed read leaves out. pinned (B, P, 4) int32: position (-1: none), its slot among the pinned keys
    and among the pinned values (-1: read the packed one), unused. counters: int32, one per row, KV head and block of 16
    query rows, all 0 before and after. sink (Hq,): a logit per head without a value.
    """

    state: Tensor
    counters: Tensor
    page: int
    scale: float
    softcap: float | None = None
    skip: Tensor | None = None
    pinned: Tensor | None = None
    sink: Tensor | None = None


def _available(device: torch.device) -> list[str]:
    if device.type != "cpu":
        return [f"no kernel for {device.type}, where whole decode steps are one launch"]
    if importlib.util.find_spec("numba") is None:
        return ["numba is not installed (pip install kvist[cpu])"]
    return []


def _codec(device: torch.device) -> tuple[ModuleType | None, list[str]]:
    """What codes and decodes on a device, or the reasons why only the reference does."""
    if device.type == "cuda" and not (reasons := _no_triton(device.type, False)):
        return importlib.import_module("kvist.kernels.codec_triton"), []
    reasons = list(_no_triton(device.type, False)) if device.type != "cpu" else _available(device)
    return (None, reasons) if reasons else (importlib.import_module("kvist.kernels.codec_numba"), [])


@cache
def encoder(traits: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast encoder and (), or None and the reasons why only the reference serves. It takes values (..., H, T, D),
    fp32 and in the transformed space, `Constants` and the slots of outliers per token; it returns what the reference
    returns, the same to the bit."""
    module, reasons = _codec(device)
    reasons = reasons or _unserved("values", traits, False)
    return (None, tuple(reasons)) if module is None or reasons else (partial(module.encode, traits), ())


@cache
def decoder(traits: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast decoder and (), or None and the reasons why only the reference serves. It takes the arrays of the
    codec's layout and `Constants`, and returns values (..., H, T, D), fp32, in the transformed space, the same to the
    bit."""
    module, reasons = _codec(device)
    reasons = reasons or _unserved("values", traits, False)
    return (None, tuple(reasons)) if module is None or reasons else (partial(module.decode, traits), ())


@cache
def exact_attention(device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """Fast attention of a few queries to a few exact tokens and (), or None and the reasons why the reference serves.

    It takes queries (B, Hq, M, D) fp32, keys and values (B, Hk, N, D) of any float type, visible (B, 1, 1 or M, N)
    bool, the scale of scores and a soft cap or None; what is invisible may hold anything. It returns a `Partial`.
    """
    if reasons := _available(device):
        return None, tuple(reasons)
    from kvist.kernels.exact_numba import attend_exact

    return attend_exact, ()


@cache
def rotator(device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast `grid.rotate`, the same to the bit, and (), or None and the reasons."""
    module, reasons = _codec(device)
    return (None, tuple(reasons)) if module is None else (module.rotate, ())


@cache
def packed_attention(key: Traits, value: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast attention over packed pages and (), or None and the reasons why only the reference serves.

    It takes queries (B, Hq, M, D) fp32 that see every packed token, keys and values as `Stored`, packed slots per row,
    a skip mask (B, slots) or None, tokens per page, the scale of scores, a soft cap or None, and for each row the
    position that page slot 0 was rotated for (slot i: i more) or None where nothing was unrotated; it returns a
    `Partial`.
    """
    reasons = _available(device) or [*_unserved("keys", key, True), *_unserved("values", value, True)]
    if value.along != "channels":
        reasons.append("values share scales along tokens")
    if value.rotary:
        reasons.append("values are stored before a rotary embedding")
    if reasons:
        return None, tuple(reasons)
    from kvist.kernels.attend_numba import attend_pages

    return partial(attend_pages, key, value), ()


def decode_attention(
    key: Traits,
    value: Traits,
    device: torch.device,
    dims: tuple[int, int] = (0, 0),
    rows: int = 1,
    pinned: bool = False,
) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast decode step and (), or None and the reasons why parts are computed one by one and merged.

    It takes queries (B, Hq, M, D) of any float type, M <= `MOST_QUERIES`, which are the last M tokens of their rows;
    keys and values as `Stored`; the exact tokens of both as `Exact`; and a `Decode`. It returns attention over
    everything, (B, Hq, M, Dv) in the queries' type, in one launch and without asking the device anything. dims: head
    sizes of keys and values, where they are known; rows: query rows per KV head; pinned: packed tokens may be left out.

    Triton's own variable TRITON_INTERPRET=1 runs its kernels on a CPU.
    """
    if any(side.hadamard and dim > 128 for side, dim in zip((key, value), dims, strict=True)):
        return None, ("the Hadamard matrix of heads of more than 128 channels does not fit beside the rest",)
    few = rows <= 8 and not pinned and dims[0] == dims[1]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _decode_attention(key, value, device.type, interpreted, dims[0] if few else -1)


@cache
def _decode_attention(key: Traits, value: Traits, device: str, interpreted: bool, dim: int):
    """dim: of heads, 0 where it is not known, -1 where the CUDA kernel does not serve the rest of the call."""
    if reasons := _no_triton(device, interpreted):
        return None, reasons
    if value.rotary:
        return None, ("values are stored before a rotary embedding",)
    if device == "cuda" and dim >= 0:
        from kvist.kernels import attend_cuda

        if not attend_cuda.unserved(key, value) and (not dim or attend_cuda.serves(key, value, dim)):
            return partial(attend_cuda.decode, key, value), ()
    from kvist.kernels.decode_triton import decode

    return partial(decode, key, value), ()


def packer(traits: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """What encodes values straight into the pages of a pool, and (), or None and the reasons why they are encoded first
    and written then. See `codec_triton.encode_pages`."""
    reasons = _no_triton(device.type, os.environ.get("TRITON_INTERPRET") == "1")
    reasons = list(reasons) or _unserved("values", traits, False)
    if traits.outliers:
        reasons.append("outliers are found before anything is packed")
    if reasons:
        return None, tuple(reasons)
    from kvist.kernels.codec_triton import encode_pages

    return partial(encode_pages, traits), ()


def stepper(key: Traits, value: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """What stores one token per row in one launch, and packs in the same launch what its numbers say; and (), or None
    and the reasons why only ordinary updates will do. See `step_triton.step`."""
    return _stepper(key, value, device.type, os.environ.get("TRITON_INTERPRET") == "1")


@cache
def _stepper(key: Traits, value: Traits, device: str, interpreted: bool):
    if reasons := _no_triton(device, interpreted):
        return None, reasons
    from kvist.kernels.step_triton import step, unserved

    reasons = unserved(key, value)
    return (None, reasons) if reasons else (partial(step, key, value), ())


def _no_triton(device: str, interpreted: bool) -> tuple[str, ...]:
    if device == "cpu" and not interpreted:
        return ("Triton's kernels run on GPUs; on a CPU parts are merged one by one",)
    if device not in ("cpu", "cuda"):
        return (f"no kernel for {device} yet",)
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed (pip install kvist[gpu])",)
    return ()


def _unserved(side: str, traits: Traits, attended: bool) -> list[str]:
    """Why tokens stored so can be neither encoded nor decoded by a kernel or, if `attended`, not attended to."""
    reasons = []
    if traits.levels == "raw":
        reasons.append(f"{side} have raw levels")
    if traits.range == "absmax":
        reasons.append(f"{side} have a range of kind absmax")
    if attended and traits.rotary == "interleaved":
        reasons.append(f"{side} are stored before an interleaved rotary embedding")
    return reasons
