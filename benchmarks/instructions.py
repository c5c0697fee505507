"""`make gpu-instructions`: warp instructions per cached number of the decode kernels' main loops, without a GPU.

A kernel at full bandwidth has so many issue slots per number and no more: 128 lanes per clock and multiprocessor, over
the numbers that arrive per clock. One that needs more instructions cannot run at the speed of memory.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.sass import disassemble, main_loop
from kvist.bench.table import machine, show, write
from kvist.coding import Codec
from kvist.kernels.contract import Decode, Exact, Stored
from kvist.methods.parts import per_channel, per_token

LANES = 128  # that a multiprocessor issues per clock


class Chip(NamedTuple):
    """A GPU by its numbers: multiprocessors, bytes per second of its memory, clock in Hz."""

    name: str
    multiprocessors: int
    bandwidth: float
    clock: float


CHIPS = {
    80: Chip("A100", 108, 1.9e12, 1.41e9),
    90: Chip("H200", 132, 4.3e12, 1.755e9),
    100: Chip("B200", 148, 7.7e12, 1.85e9),
}


class Subject(NamedTuple):
    """A kernel to count. numbers: cached ones that a warp's round of the main loop consumes, keys and values."""

    name: str
    bits: int
    group: int
    numbers: int
    function: str
    cubin: Callable[[int], bytes]


def _cuda(bits: int, group: int) -> Subject:
    from kvist.kernels.cuda.attend import Cell, compiled

    cell = Cell(KB=bits, VB=bits, KG=group, VG=group, PAGE=max(64, group), HEADS=8, ROWS=4, QUERIES=1, TYPE=1)
    numbers = cell.tuning.span * 256
    return Subject("cuda", bits, group, numbers, "decode", lambda arch: compiled(cell, arch, counted=True))


def on_paper(key: Codec, value: Codec, heads: int = 8, dim: int = 128, rows: int = 4, page: int = 64) -> tuple:
    """The arguments of a decode step (see STEP in `choose`, and the traits before them) as shapes and types alone."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def stored(codec: Codec) -> Stored:
        specs = codec.layout(heads, dim, torch.bfloat16).items()
        arrays = {name: empty(1, *spec.page_shape(heads, page), dtype=spec.dtype) for name, spec in specs}
        return Stored(arrays, empty(1, 1, dtype=torch.int32), codec.constants(heads, torch.device("meta")))

    exact = Exact(empty(1, heads, 4, dim), empty(1, heads, 128, dim), empty(1, heads, 0, dim))
    call = Decode(empty(1, 8, dtype=torch.int32), empty(heads, dtype=torch.int32), page, dim**-0.5)
    return key.traits, value.traits, empty(1, heads * rows, 1, dim), stored(key), stored(value), exact, exact, call


def _triton(bits: int, group: int) -> Subject:
    from kvist.kernels.triton.ahead import compiled
    from kvist.kernels.triton.attend import decode_kernel
    from kvist.kernels.triton.decode import FOLDED, decode

    call = on_paper(per_channel(bits, group), per_token(bits, group), page=max(64, group))
    numbers = FOLDED.tile * 256 // FOLDED.warps
    return Subject(
        "triton", bits, group, numbers, "decode_kernel",
        lambda arch: compiled(arch, decode_kernel, decode, *call)[0].asm["cubin"],
    )  # fmt: skip


def budget(chip: Chip, bits: int, group: int) -> float:
    """Issue slots per number at full bandwidth; a number takes its bits and a share of two halves per group."""
    nbytes = (bits + 32 / group) / 8
    return LANES * chip.multiprocessors * chip.clock * nbytes / chip.bandwidth


def run(
    arch: Sequence[int] = tuple(CHIPS),
    bits: Sequence[int] = (2, 4),
    group: Sequence[int] = (128, 32),
    out: str | Path | None = None,
    as_json: bool = False,
) -> dict:
    """A row per kernel, width, group and architecture; printed, and kept in `out`. Raises ValueError where neither
    compiler is installed, and for an architecture that is not known."""
    if unknown := set(arch) - CHIPS.keys():
        raise ValueError(f"architectures are {', '.join(map(str, CHIPS))}, found {min(unknown)}")
    makers = {"triton": _triton, "cuda.bindings": _cuda}
    found = [make for module, make in makers.items() if _installed(module)]
    if not found or not _installed("triton"):
        raise ValueError("counting instructions needs compilers: pip install kvist[cuda]")
    rows = [_row(make(b, g), a) for a in arch for make in found for b in bits for g in group]
    title = "Warp instructions per cached number in the main loop, head size 128, 4 query rows"
    report = {"title": title, "machine": machine(), "chips": {a: CHIPS[a]._asdict() for a in arch}, "rows": rows}
    write(report, out)
    show(report, as_json)
    return report


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _row(subject: Subject, arch: int) -> dict:
    row = {"kernel": subject.name, "arch": f"sm_{arch}", "bits": subject.bits, "group": subject.group}
    try:
        loop = main_loop(disassemble(subject.cubin(arch)), subject.function)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    slots = budget(CHIPS[arch], subject.bits, subject.group)
    usual = 32 * loop.usual / subject.numbers
    common = ", ".join(f"{name} {n}" for name, n in loop.opcodes.most_common(6))
    return row | {
        "per number": usual,
        "with rare": 32 * loop.instructions / subject.numbers,
        "budget": slots,
        "of budget": usual / slots,
        "most": common,
    }
