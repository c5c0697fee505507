"""(operation, traits, device) to an implementation, or to the reasons why only the reference serves."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch


@dataclass(frozen=True)
class Traits:
    """How one side is stored, as plain data: what a kernel may ask. `group` 0 is the whole head."""

    levels: str
    bits: int
    along: str
    group: int
    across_heads: bool
    range: str
    outliers: int


def _available(device: torch.device) -> list[str]:
    if device.type != "cpu":
        return [f"no kernel for {device.type} yet"]
    if importlib.util.find_spec("numba") is None:
        return ["numba is not installed (pip install kvist[cpu])"]
    return []


@cache
def encoder(traits: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast encoder and (), or None and the reasons why only the reference serves. It takes values (..., H, T, D),
    fp32, and returns the arrays of the codec's layout, the same to the bit."""
    reasons = _available(device) or _unserved("values", traits)
    if reasons:
        return None, tuple(reasons)
    from kvist.kernels.codec_numba import encode

    return partial(encode, traits), ()


@cache
def decoder(traits: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast decoder and (), or None and the reasons why only the reference serves. It takes the arrays of the
    codec's layout and returns values (..., H, T, D), fp32, in the transformed space, the same to the bit."""
    reasons = _available(device) or _unserved("values", traits)
    if reasons:
        return None, tuple(reasons)
    from kvist.kernels.codec_numba import decode

    return partial(decode, traits), ()


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
    if reasons := _available(device):
        return None, tuple(reasons)
    from kvist.kernels.codec_numba import rotate

    return rotate, ()


@cache
def packed_attention(key: Traits, value: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast attention over packed pages and (), or None and the reasons why only the reference serves.

    It takes queries (B, Hq, M, D) fp32 that see every packed token, the pool arrays of keys and of values, their page
    tables (B, pages) int32, packed slots per row, a skip mask (B, slots) or None, tokens per page, the scale of scores
    and a soft cap or None; it returns a `Partial`.
    """
    reasons = _available(device) or [*_unserved("keys", key), *_unserved("values", value)]
    if value.along != "channels":
        reasons.append("values share scales along tokens")
    if reasons:
        return None, tuple(reasons)
    from kvist.kernels.attend_numba import attend_pages

    return partial(attend_pages, key, value), ()


def _unserved(side: str, traits: Traits) -> list[str]:
    reasons = []
    if traits.levels != "uniform":
        reasons.append(f"{side} have {traits.levels} levels")
    if traits.range != "minmax":
        reasons.append(f"{side} have a range of kind {traits.range}")
    if traits.outliers:
        reasons.append(f"{side} have outliers")
    if traits.across_heads:
        reasons.append(f"{side} share scales across heads")
    return reasons
