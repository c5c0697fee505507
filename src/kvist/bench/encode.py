"""`kvist bench encode`: bulk encoding per core, and one page at decode time, against a copy of the same bytes."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kvist.bench.reports import Encode
from kvist.bench.table import machine, show
from kvist.cache.track import TILE
from kvist.coding import Codec
from kvist.methods import parse
from kvist.testing.stand_in import stand_in

METHODS = ("kivi:1", "kivi:2", "kivi:4", "kvmix:3", "int4", "int8", "hadamard:4", "kvquant:2", "kvquant:3", "kvquant:4")
HEADS, DIM, TOKENS, PAGE = 2, 128, 16384, 64
SHAPE = f"{HEADS} KV heads of {DIM}, bf16, one thread"


def run(
    methods: Sequence[str] = METHODS, rounds: int = 15, out: str | Path | None = None, as_json: bool = False
) -> dict:
    """Megabytes of bf16 input per second, microseconds for a page of 64 tokens and, where a codec takes tokens one by
    one, for one of them: of each side of each method."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(1, HEADS, TOKENS, DIM).bfloat16()
        step = TILE // (HEADS * DIM)
        copied = _rate(lambda tile: tile.clone(), x, step, rounds)
        rows = []
        for text in methods:
            plan = stand_in(parse(text), HEADS, DIM).layers[0]
            for name, side in zip(("keys", "values"), plan.sides, strict=True):
                encode = partial(_encode, side.codec)
                rate = _rate(encode, x, step, rounds)
                page = _median(lambda encode=encode: encode(x[:, :, :PAGE]), 10 * rounds)
                row = {"method": text, "side": name, "MB/s": rate / 1e6, "x copy": rate / copied, "page us": page * 1e6}
                if side.codec.granule == 1:
                    row["token us"] = 1e6 * _median(lambda encode=encode: encode(x[:, :, :1]), 10 * rounds)
                rows.append(row)
    finally:
        torch.set_num_threads(threads)
    report = {"bench": "encode", "title": f"Encoding: {SHAPE}", "machine": machine(), "copy MB/s": copied / 1e6}
    report["rows"] = rows
    Encode.model_validate(report).save(out)
    show(report, as_json)
    return report


def _encode(codec: Codec, tile: Tensor) -> object:
    return codec.encode(tile, torch.arange(tile.shape[2]).unsqueeze(0))


def _rate(encode: Callable[[Tensor], object], x: Tensor, step: int, rounds: int) -> float:
    """Bytes of x per second, a tile at a time."""

    def once() -> None:
        for start in range(0, x.shape[2], step):
            encode(x[:, :, start : start + step])

    return x.nbytes / _median(once, rounds)


def _median(action: Callable[[], object], rounds: int) -> float:
    action()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
