"""What the portable GPU kernels serve, and why not. Loads Triton only for what is served."""

import importlib.util
from collections.abc import Callable
from functools import partial

from kvist.kernels.contract import MOST_CELLS, MOST_QUERIES, Operation, Request

CODING = {Operation.ENCODE, Operation.DECODE, Operation.PACK}
OPERATIONS = CODING | {Operation.ROTATE, Operation.STORE, Operation.STEP}
TURNED = 128  # channels: the largest Hadamard matrix that fits beside the rest of a decode step


def unserved(operation: Operation, request: Request) -> tuple[str, ...]:
    """Why these kernels do not serve a request; () if they do."""
    if request.device == "cpu" and not request.interpreted:
        return ("they run on GPUs; on a CPU parts are merged one by one",)
    if request.device not in ("cpu", "cuda"):
        return (f"there are none for {request.device} yet",)
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed (pip install kvist[gpu])",)
    if operation not in OPERATIONS:
        return ("whole decode steps are one launch",)
    reasons = []
    for side, traits in request.named():
        if operation in CODING and traits.levels == "raw":
            reasons.append(f"{side} have raw levels")
        if operation in CODING and traits.range == "absmax":
            reasons.append(f"{side} have a range of kind absmax")
        if operation == Operation.PACK and traits.outliers:
            reasons.append("outliers are found before anything is packed")
        if operation == Operation.STORE and traits.outliers:
            reasons.append(f"{side} keep outliers")
        if operation == Operation.STORE and traits.rotary:
            reasons.append(f"{side} are stored before a rotary embedding")
    if operation == Operation.STEP:
        reasons += _step(request)
    return tuple(reasons)


def _step(request: Request) -> list[str]:
    reasons, (key, value) = [], request.sides
    if value.rotary:
        reasons.append("values are stored before a rotary embedding")
    if any(side.hadamard and dim > TURNED for side, dim in zip(request.sides, request.dims, strict=False)):
        reasons.append(f"the Hadamard matrix of heads of more than {TURNED} channels does not fit beside the rest")
    if request.batch * request.heads > MOST_CELLS:
        reasons.append(f"more than {MOST_CELLS} rows times KV heads")
    if request.queries > MOST_QUERIES:
        reasons.append(f"more than {MOST_QUERIES} queries")
    if request.gaps:
        reasons.append("a deep crop has closed a group")
    if key.rotary and request.shifted:
        reasons.append("a row's positions have gaps")
    if request.padded and request.queries > 1:
        reasons.append("several queries, and rows with padding")
    if request.hidden or request.biased:
        reasons.append("a mask of the model's own")
    if request.chunk:
        reasons.append("tokens of the update are not stored yet")
    return reasons


def implementation(operation: Operation, request: Request) -> Callable:
    """What runs, for a request that is served."""
    if operation == Operation.STEP:
        from kvist.kernels.triton.decode import decode

        return partial(decode, *request.sides)
    if operation == Operation.STORE:
        from kvist.kernels.triton.step import step

        return partial(step, *request.sides)
    from kvist.kernels.triton import codec

    if operation == Operation.ROTATE:
        return codec.rotate
    functions = {Operation.ENCODE: codec.encode, Operation.DECODE: codec.decode, Operation.PACK: codec.encode_pages}
    return partial(functions[operation], *request.sides)
