"""`kvist bench decode`: time of one decode step's cache and attention, against transformers' own caches."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvist.bench import contenders
from kvist.bench.contenders import SHAPE, Contender

LENGTHS = (1024, 4096, 16384, 65536)
METHODS = ("kivi:2", "kivi:4", "hadamard:4", "streaming:2", "logquant:2")
SLOWEST = 0.5  # seconds: a contender slower than this gets fewer rounds


def run(
    lengths: Sequence[int] = LENGTHS,
    methods: Sequence[str] = METHODS,
    steps: int = 40,
    threads: int = 0,
    seed: int = 0,
    out: str | Path | None = None,
    as_json: bool = False,
) -> list[dict]:
    """Rows of medians, interleaved over contenders, each with its ratio to DynamicCache; printed, and kept in `out`."""
    if threads:
        torch.set_num_threads(threads)
    rows = []
    with torch.no_grad():
        for length in lengths:
            torch.manual_seed(seed)
            rows += _race(length, methods, steps)
    report = {"shape": SHAPE, "threads": torch.get_num_threads(), "machine": _machine(), "seed": seed, "rows": rows}
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(report, indent=1) + "\n")
        scratch.replace(path)
    if as_json:
        print(json.dumps(report))
    else:
        _print(report)
    return rows


def _race(length: int, methods: Sequence[str], steps: int) -> list[dict]:
    makers = {"dynamic": contenders.dynamic}
    makers |= {f"{b}-{n}": (lambda b=b, n=n: contenders.quantized(b, n)) for b in ("quanto", "hqq") for n in (4, 2)}
    makers |= {m: (lambda m=m: contenders.ours(m)) for m in methods}
    racers: dict[str, Contender] = {}
    failed = {}
    for name, make in makers.items():
        try:
            racer = make()
            racer.fill(length)
            start = time.perf_counter()
            racer.step()  # the first step compiles
            racer.step()
            racers[name], racer.pace = racer, (time.perf_counter() - start) / 2
        except Exception as error:  # a contender that is not installed, or that fails, is reported, not hidden
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times: dict[str, list[float]] = {name: [] for name in racers}
    for i in track(
        range(steps), description=f"{length} tokens", console=Console(stderr=True), disable=not sys.stderr.isatty()
    ):
        for name, racer in racers.items():
            if racer.pace > SLOWEST and i % 8:
                continue
            start = time.perf_counter()
            racer.step()
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["dynamic"])
    rows = []
    for name, racer in racers.items():
        ordered = sorted(times[name])
        rows.append(
            {
                "tokens": length,
                "contender": name,
                "ms": 1e3 * statistics.median(ordered),
                "ms_p10": 1e3 * ordered[len(ordered) // 10],
                "ms_p90": 1e3 * ordered[-1 - len(ordered) // 10],
                "ms_worst": 1e3 * ordered[-1],
                "ratio": statistics.median(ordered) / base,
                "cache_bytes": racer.nbytes(),
                "steps": len(ordered),
            }
        )
    return rows + [{"tokens": length, "contender": name, "failed": reason} for name, reason in failed.items()]


def _machine() -> dict:
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _print(report: dict) -> None:
    table = Table(title=f"One decode step: cache and attention of {report['shape']}, {report['threads']} threads")
    for column, justify in (
        ("tokens", "right"),
        ("contender", "left"),
        ("median ms", "right"),
        ("p10-p90 ms", "right"),
    ):
        table.add_column(column, justify=justify)
    table.add_column("x dynamic", justify="right")
    table.add_column("cache MiB", justify="right")
    for row in report["rows"]:
        if "failed" in row:
            table.add_row(str(row["tokens"]), row["contender"], "failed", row["failed"][:40], "", "")
            continue
        spread = f"{row['ms_p10']:.2f}-{row['ms_p90']:.2f}"
        size = f"{row['cache_bytes'] / 2**20:.2f}"
        table.add_row(str(row["tokens"]), row["contender"], f"{row['ms']:.2f}", spread, f"{row['ratio']:.2f}", size)
    Console().print(table)
