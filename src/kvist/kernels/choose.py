"""Who serves a request, and why not the others: every backend is asked the same question, in order.

What each operation takes and returns, called as the chosen function (`Choice.run`):

- ENCODE: values (..., H, T, D) fp32 in the transformed space, `Constants`, slots of outliers per token. The arrays of
  the codec's layout, the same to the bit as the reference's. DECODE: the arrays and `Constants`; values (..., H, T, D),
  fp32, in the transformed space, the same to the bit. ROTATE: `reference.grid.rotate`, to the bit.
- PACK: encodes straight into the pages of a pool, see `triton.codec.encode_pages`. STORE: one token per row, and what
  is due to be packed, in one launch, see `triton.step.step`.
- PAGES: queries (B, Hq, M, D) fp32 that see every packed token, keys and values as `Stored`, packed slots per row, a
  skip mask (B, slots) or None, tokens per page, the scale of scores, a soft cap or None, and for each row the position
  that page slot 0 was rotated for or None. A `Partial`.
- EXACT: queries (B, Hq, M, D) fp32, keys and values (B, Hk, N, D) of any float type, visible (B, 1, 1 or M, N) bool,
  the scale of scores, a soft cap or None; what is invisible may hold anything. A `Partial`.
- STEP: queries (B, Hq, M, D) of any float type, M <= `MOST_QUERIES`, the last M tokens of their rows; keys and values
  as `Stored`; the exact tokens of both as `Exact`; and a `Decode`. Attention over everything, (B, Hq, M, Dv) in the
  queries' type, in one launch and without asking the device anything.
- WHOLE: on CPUs. A layer's `Storage`, to what takes its steps while that stays where it is: `store(keys, values,
  Write)` for up to 32 new tokens per row, packing the same bits as ENCODE, and `attend(queries, See, scale, soft cap,
  sink)`, (B, Hq, M, Dv) in the queries' type.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from kvist.kernels.contract import Operation, Request, Traits
from kvist.kernels.cuda import serves as cuda
from kvist.kernels.numba import serves as numba
from kvist.kernels.triton import serves as triton

BACKENDS = {"numba": numba, "cuda": cuda, "triton": triton}  # in the order in which they are asked


class Choice(NamedTuple):
    """Who serves: a name to show and the function, "reference" and None where no kernel does. `refused`: why each
    backend that was asked before does not."""

    name: str
    run: Callable | None
    refused: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why no kernel serves, each reason with the backend that gives it; () where one does."""
        if self.run is not None:
            return ()
        return tuple(f"{backend}: {', '.join(reasons)}" for backend, reasons in self.refused)


@cache
def choose(operation: Operation, request: Request) -> Choice:
    """The first backend that serves, in the order of `BACKENDS`."""
    refused = []
    for name, backend in BACKENDS.items():
        reasons = backend.unserved(operation, request)
        if not reasons:
            run = backend.implementation(operation, request)
            function = getattr(run, "func", run)
            shown = f"{function.__module__.removeprefix('kvist.kernels.')}.{function.__name__}"
            return Choice(shown, run, tuple(refused))
        refused.append((name, reasons))
    return Choice("reference", None, tuple(refused))


def place(device: torch.device) -> dict:
    """What a device is, as the fields of a `Request`. Triton's own variable TRITON_INTERPRET=1 runs its kernels on a
    CPU."""
    known = device.type == "cuda" and torch.cuda.is_available()
    return {
        "device": device.type,
        "capability": _capability(device) if known else None,
        "interpreted": device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1",
    }


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def coder(operation: Operation, traits: Traits, device: torch.device) -> Callable | None:
    """What codes one side: ENCODE, DECODE or PACK; None where only the reference does."""
    return choose(operation, Request(sides=(traits,), **place(device))).run
