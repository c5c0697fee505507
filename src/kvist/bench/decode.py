"""`kvist bench decode`: time of one decode step's cache and attention, against transformers' own caches."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from kvist.bench import contenders
from kvist.bench.contenders import SHAPE, Step
from kvist.bench.reports import Decode
from kvist.bench.table import machine, show

LENGTHS = (1024, 4096, 16384, 65536)
BARE = "keys=post-rope outliers=0"
KVQUANT = ("kvquant:2", "kvquant:3", "kvquant:4", f"kvquant:2 {BARE}", f"kvquant:4 {BARE}")
METHODS = ("kivi:2", "kivi:3", "kivi:4", "hadamard:4", "streaming:2", "logquant:2", *KVQUANT)
SLOW = 0.5  # seconds: a contender slower than this gets an eighth of the rounds


def run(
    lengths: Sequence[int] = LENGTHS,
    methods: Sequence[str] = METHODS,
    steps: int = 40,
    threads: int = 0,
    seed: int = 0,
    out: str | Path | None = None,
    as_json: bool = False,
) -> dict:
    """Medians over interleaved rounds, each with its ratio to the faster DynamicCache; printed, and kept in `out`.

    Raises ValueError for an unknown method. A contender that is not installed or fails is a row that says so.
    """
    if threads:
        torch.set_num_threads(threads)
    makers = _makers(methods)
    rows = []
    with torch.no_grad():
        for length in lengths:
            torch.manual_seed(seed)
            rows += _race(length, makers, steps)
    title = f"One decode step: cache and attention of {SHAPE}, {torch.get_num_threads()} threads"
    report = {"bench": "decode", "title": title, "machine": machine(), "seed": seed, "rows": rows}
    Decode.model_validate(report).save(out)
    show(report, as_json)
    return report


def _makers(methods: Sequence[str]) -> dict[str, Callable[[], Step]]:
    makers: dict[str, Callable[[], Step]] = {
        "dynamic": contenders.dynamic,
        "dynamic, masked": lambda: contenders.dynamic(masked=True),
    }
    for backend in ("quanto", "hqq"):
        for bits in (4, 2):
            makers[f"{backend}:{bits}"] = lambda backend=backend, bits=bits: contenders.quantized(backend, bits)
    for text in methods:
        contenders.parse(text)
        makers[f"kvist {text}"] = lambda text=text: contenders.ours(text)
    return makers


def _race(length: int, makers: dict[str, Callable[[], Step]], steps: int) -> list[dict]:
    racers: dict[str, tuple[Step, bool]] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            racer = make()
            racer.fill(length)
            racer.step()  # the first step compiles
            racers[name] = racer, _timed(racer.step) > SLOW
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in racers}
    hidden = not sys.stderr.isatty()
    for i in track(range(steps), f"{length} tokens", console=Console(stderr=True), disable=hidden):
        for name, (racer, slow) in racers.items():
            if not slow or i % 8 == 0:
                times[name].append(_timed(racer.step))
    base = min(statistics.median(taken) for name, taken in times.items() if name.startswith("dynamic"))
    rows = [_row(length, name, sorted(times[name]), base, racer) for name, (racer, _) in racers.items()]
    return rows + [{"tokens": length, "contender": name, "failed": reason} for name, reason in failed.items()]


def _row(length: int, name: str, ordered: list[float], base: float, racer: Step) -> dict:
    edge = len(ordered) // 10
    return {
        "tokens": length,
        "contender": name,
        "median ms": 1e3 * statistics.median(ordered),
        "p10 ms": 1e3 * ordered[edge],
        "p90 ms": 1e3 * ordered[-1 - edge],
        "worst ms": 1e3 * ordered[-1],
        "x dynamic": statistics.median(ordered) / base,
        "cache MiB": racer.nbytes() / 2**20,
    }


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
