"""How fast keys and values are packed in bulk, in bytes in and out, against a plain copy."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import device_time
from benchmarks.kernel_gate import first_line
from kvist.kernels.choose import choose, place
from kvist.kernels.contract import Operation, Request
from kvist.methods import parse
from kvist.testing.stand_in import stand_in

TOKENS, HEADS, DIM = 1 << 16, 8, 128
TOY_TOKENS, TOY_HEADS = 256, 1
ROUNDS = 20


def rows(methods: Sequence[str], device: torch.device, rounds: int, toy: bool, copied: float | None) -> list[dict]:
    """A row per method and side: bits out, what encodes, and the speed where it is timed."""
    tokens, heads = (TOY_TOKENS, TOY_HEADS) if toy else (TOKENS, HEADS)
    found = []
    for method in methods:
        plan = stand_in(parse(method), heads, DIM).layers[0]
        for name, side in zip(("keys", "values"), plan.sides, strict=True):
            row = {"method": method, "side": name, "device": device_time.label(device)}
            try:
                found.append(row | _measured(side.codec, heads, tokens, device, rounds, copied))
            except Exception as reason:
                found.append(row | {"failed": first_line(reason)})
    return found


def _measured(codec, heads: int, tokens: int, device: torch.device, rounds: int, copied: float | None) -> dict:
    served = choose(Operation.ENCODE, Request(sides=(codec.traits,), **place(device))).name
    count = device_time.copies_for(2 * heads * tokens * DIM) if rounds else 1
    inputs = [torch.randn(1, heads, tokens, DIM, device=device).half() for _ in range(count)]
    at = torch.arange(tokens, device=device).unsqueeze(0)
    arrays = codec.encode(inputs[0], at)
    arrays.pop("clipped", None)
    out = sum(array.nbytes for array in arrays.values())
    row = {"kernel": served, "bits out": 8 * out / inputs[0].numel()}
    if rounds and copied:
        turns: list[Callable[[], object]] = [partial(codec.encode, x, at) for x in inputs]
        replay = device_time.Replay(turns)
        seconds = statistics.median(replay.seconds() for _ in range(min(rounds, ROUNDS)))
        speed = (inputs[0].nbytes + out) / seconds
        row |= {"median us": 1e6 * seconds, "GB/s": speed / 1e9, "x copy": speed / copied}
    return row
