"""What the CUDA kernel serves, and why not. Loads its host side only for what is served."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from kvist.kernels.contract import MOST_CELLS, MOST_QUERIES, Operation, Request

DIM = 128
ROWS = 8  # query rows per KV head: the width of a tensor core's tile
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def unserved(operation: Operation, request: Request) -> tuple[str, ...]:
    """Why the kernel does not serve a request; () if it does."""
    if request.device != "cuda":
        return (f"it runs on NVIDIA GPUs, not on {request.device}",)
    if operation != Operation.STEP:
        return ("it does decode steps alone",)
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return ("cuda-bindings is not installed (pip install kvist[cuda])",)
    return (*_stored(request), *_called(request))


def _stored(request: Request) -> list[str]:
    """Of how keys and values lie."""
    reasons, (key, value) = [], request.sides
    for side, traits in request.named():
        if traits.levels != "uniform" or traits.bits not in (2, 4):
            reasons.append(f"{side} are not uniform numbers of 2 or 4 bits")
        if traits.range != "minmax":
            reasons.append(f"{side} have a range of kind {traits.range}")
        if traits.outliers or traits.rotary or traits.hadamard or traits.across_heads:
            reasons.append(f"{side} keep outliers, or are stored in another space, or share ranges between heads")
    if key.along != "tokens" or key.group not in (32, 64, 128):
        reasons.append("keys do not share ranges along 32, 64 or 128 tokens")
    if value.along != "channels" or value.group not in (0, 32, 64, 128):
        reasons.append("values do not share ranges along 32, 64 or 128 channels")
    if request.page % max(32, key.group):
        reasons.append(f"pages of {request.page} tokens are not whole groups")
    if request.pinned or request.gaps:
        reasons.append("packed tokens are left out (pins, or a deep crop)")
    return reasons


def _called(request: Request) -> list[str]:
    """Of what is asked about them."""
    reasons = []
    if set(request.dims) - {DIM}:
        reasons.append(f"heads have other than {DIM} channels")
    if request.rows > ROWS:
        reasons.append(f"more than {ROWS} query rows per KV head")
    if request.queries > MOST_QUERIES or (request.padded and request.queries > 1):
        reasons.append("more queries than a step has, or several and rows with padding")
    if request.batch * request.heads > MOST_CELLS:
        reasons.append(f"more than {MOST_CELLS} rows times KV heads")
    if request.dtype is not None and (request.dtype not in TYPES or request.kept not in (None, request.dtype)):
        reasons.append(f"queries are {request.dtype}, exact tokens {request.kept}")
    if request.capability is not None and request.capability < (8, 0):
        reasons.append("the GPU is older than sm_80")
    if request.hidden or request.biased or request.chunk:
        reasons.append("a mask of the model's own, or tokens that are not stored yet")
    return reasons


def implementation(operation: Operation, request: Request) -> Callable:
    """What runs, for a request that is served."""
    from kvist.kernels.cuda.attend import decode

    return partial(decode, *request.sides)
