"""What the CUDA kernel serves, and why not."""

import importlib.util
from collections.abc import Callable
from functools import partial

from kvist.kernels.contract import MOST_CELLS, MOST_QUERIES, Operation, Request
from kvist.kernels.cuda.attend import TYPES, decode

LEVELS = {"uniform": (1, 2, 3, 4, 8), "table": (2, 3, 4)}  # levels: bits
GROUPS = (32, 64, 128)  # tokens or channels that share a range
DIMS = (64, 128)
ROWS = 8  # query rows per KV head: the width of a tensor core's tile


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
        if traits.bits not in LEVELS.get(traits.levels, ()):
            reasons.append(f"{side} are neither uniform numbers of 1, 2, 3, 4 or 8 bits nor tables of 2, 3 or 4")
        if traits.range != "minmax" and (side, traits.range) != ("keys", "fixed"):
            reasons.append(f"{side} have a range of kind {traits.range}")
        if traits.outliers or traits.rotary:
            reasons.append(f"{side} keep outliers, or are stored before a rotary embedding")
    if key.hadamard != value.hadamard:
        reasons.append("one side alone is stored in Hadamard space")
    if value.hadamard and value.group:
        reasons.append("values in Hadamard space share ranges along less than a head")
    if (key.group not in GROUPS or key.across_heads) if key.along == "tokens" else key.group:
        reasons.append("keys share ranges neither along 32, 64 or 128 tokens nor along all channels of a token")
    if value.along != "channels" or value.group not in (0, *GROUPS):
        reasons.append("values do not share ranges along 32, 64 or 128 channels")
    if request.page % max(64, key.group if key.along == "tokens" else 0):
        reasons.append(f"pages of {request.page} tokens are not whole groups")
    if request.pinned or request.gaps:
        reasons.append("packed tokens are left out (pins, or a deep crop)")
    return reasons


def _called(request: Request) -> list[str]:
    """Of what is asked about them."""
    reasons, (key, value) = [], request.sides
    for dim in set(request.dims):
        if len(set(request.dims)) > 1 or dim not in DIMS or dim * min(key.bits, value.bits) < 128 or value.group > dim:
            reasons.append(f"heads of {dim} channels: it reads 64 or 128 on both sides, of 128 stored bits or more")
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
    return partial(decode, *request.sides)
