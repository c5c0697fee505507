"""What the compiled loops serve, and why not. Loads numba only for what is served."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from kvist.kernels.contract import Operation, Request
from kvist.types import HOLD

OPERATIONS = {Operation.ENCODE, Operation.DECODE, Operation.ROTATE, Operation.PAGES, Operation.EXACT}
OPERATIONS |= {Operation.WHOLE}
TYPES = {torch.float32, torch.float16, torch.bfloat16}


def unserved(operation: Operation, request: Request) -> tuple[str, ...]:
    """Why these loops do not serve a request; () if they do."""
    if request.device != "cpu":
        return (f"they run on CPUs, not on {request.device}",)
    if importlib.util.find_spec("numba") is None:
        return ("numba is not installed (pip install kvist[cpu])",)
    if operation not in OPERATIONS:
        return ("here parts are computed one by one and merged",)
    if operation == Operation.WHOLE:
        return tuple(_whole(request))
    reasons = [] if operation == Operation.EXACT else _coding(request)
    if operation == Operation.PAGES:
        reasons += _pages(request)
    if operation == Operation.EXACT and request.kept not in TYPES | {None}:
        reasons.append(f"exact tokens are {request.kept}")
    if operation in (Operation.PAGES, Operation.EXACT):
        if request.queries > HOLD:
            reasons.append(f"more than {HOLD} queries")
        if request.biased:
            reasons.append("scores have a bias, or a mask per head")
    return tuple(reasons)


def _coding(request: Request) -> list[str]:
    reasons = []
    for side, traits in request.named():
        if traits.levels == "raw":
            reasons.append(f"{side} have raw levels")
        if traits.range == "absmax":
            reasons.append(f"{side} have a range of kind absmax")
    return reasons


def _whole(request: Request) -> list[str]:
    key, _ = request.sides
    reasons = [f"{side} have a range of kind absmax" for side, traits in request.named() if traits.range == "absmax"]
    reasons += _turned(request) + _wide(request)
    if key.rotary and request.pinned:
        reasons.append("keys are stored before a rotary embedding, and some are kept exact as well")
    if request.kept not in TYPES | {None}:
        reasons.append(f"exact tokens are {request.kept}")
    if request.dtype not in TYPES | {None}:
        reasons.append(f"queries are {request.dtype}")
    if request.queries > HOLD:
        reasons.append(f"more than {HOLD} queries")
    if request.hidden:
        reasons.append("a mask hides what a query would see")
    if request.interpreted:
        reasons.append("Triton's kernels are asked for (TRITON_INTERPRET=1)")
    return reasons


def _wide(request: Request) -> list[str]:
    return [
        f"{side} have outliers, and heads of more than 256"
        for (side, traits), dim in zip(request.named(), request.dims, strict=False)
        if traits.outliers and dim > 256
    ]


def _turned(request: Request) -> list[str]:
    """What is refused of keys and values that are packed before a rotary embedding."""
    key, value = request.sides
    reasons = [f"{side} are stored before an interleaved rotary embedding"
               for side, traits in request.named() if traits.rotary == "interleaved"]  # fmt: skip
    if value.rotary:
        reasons.append("values are stored before a rotary embedding")
    if key.rotary and (request.gaps or request.shifted):
        reasons.append("keys are stored before a rotary embedding, and their positions have gaps")
    return reasons


def _pages(request: Request) -> list[str]:
    reasons = _turned(request) + _wide(request)
    if request.hidden:
        reasons.append("a query does not see every packed token")
    return reasons


def implementation(operation: Operation, request: Request) -> Callable:
    """What runs, for a request that is served."""
    if operation == Operation.EXACT:
        from kvist.kernels.numba.exact import attend_exact

        return attend_exact
    if operation == Operation.PAGES:
        from kvist.kernels.numba.bound import attend_pages

        return partial(attend_pages, *request.sides)
    if operation == Operation.WHOLE:
        from kvist.kernels.numba.bound import Bound

        return partial(Bound, *request.sides)
    from kvist.kernels.numba import codec

    if operation == Operation.ROTATE:
        return codec.rotate
    return partial(codec.encode if operation == Operation.ENCODE else codec.decode, *request.sides)
