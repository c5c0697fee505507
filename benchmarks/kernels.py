"""`make gpu-kernels`: one layer's decode attention, ours over packed pages against others' over fp16 and FP8.

First every method must be right; then contenders are timed on the device, in turn, over data that its cache cannot
hold. Without a GPU all of it runs at toy sizes and nothing is timed.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import device_time, kernel_contenders, kernel_gate, kernel_storage
from benchmarks.kernel_contenders import FP8, FP16, OURS, Plain, Runner
from benchmarks.kernel_packing import rows as packing
from benchmarks.kernel_storage import Shape
from kvist.bench.memory import free
from kvist.bench.table import show, write
from kvist.methods import parse

SHAPES = (
    "32/32:128K",
    "32/8:128K",
    "32/8:4K",
    "32/8:64Kx8",
    "32/32:32Kx8",
    "32/8:32Kx8",
    "32/32:32K",
    "32/8:32K",
    "32/32:4K",
)  # what is asked most comes first, for the case that time ends
TOY_SHAPES = ("2/2:230", "4/1:300x2")
METHODS = (
    "kivi:4 group=128",
    "kivi:4",
    "kivi:3 group=64",
    "kivi:2 group=128",
    "kivi:2",
    "kvquant:4 keys=post-rope outliers=0",
    "kvquant:4",
)
VARIANT = "32/8:32Kx8"  # where pages anywhere and rows of any length are compared with pages in order
TOY_VARIANT = "2/1:200x3"
VARIED = ("kivi:4 group=128", "kivi:2")
PACKED = ("kivi:4 group=128", "kivi:2", "kvquant:4 keys=post-rope outliers=0")
ROUNDS = 50
UNITS = {"GB/s": 1e9, "MB": 1e6}


def run(
    shapes: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    device: str = "auto",
    rounds: int = ROUNDS,
    toy: bool = False,
    variants: bool = True,
    gates: Sequence[dict] | None = None,
    out: str | Path | None = None,
    plot: str | Path | None = None,
    as_json: bool = False,
) -> dict:
    """A row per shape and contender; printed, and kept in `out` after every shape.

    toy: as small as an interpreter needs; so it is on a CPU, whatever is asked. gates: what `kernel_gate.gate` said of
    the methods, where that was asked before. A contender that is not installed, fails or is wrong is a row that says
    so, and is not timed. Raises ValueError for an unknown method or shape.
    """
    for method in methods:
        parse(method)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    timed = place.type == "cuda"
    if plot and not timed:
        raise ValueError("a plot needs times, and without a GPU nothing is timed: leave the plot out, or run on a GPU")
    toy = toy or not timed
    chosen = [Shape.parse(text) for text in shapes or (TOY_SHAPES if toy else SHAPES)]
    chosen = [shape.toy() for shape in chosen] if toy else chosen
    speed = device_time.read_bandwidth(place) if timed else None
    report: dict = {
        "title": f"Decode attention of one layer, {device_time.label(place)}",
        "machine": device_time.describe(place),
        "settings": {"rounds": rounds if timed else 0, "toy": toy, "tolerance": kernel_gate.TOLERANCE},
        "gates": [],
        "rows": [],
        "packing": [],
    }
    if speed:
        report["read GB/s"] = speed / UNITS["GB/s"]
    with torch.no_grad():
        for method in methods if gates is None else ():
            report["gates"].append(kernel_gate.gate(method, place, toy))
            _settle(place)
        report["gates"] += gates or ()
        wrong = {found["method"]: found["failed"] for found in report["gates"] if "failed" in found}
        if timed:
            kernel_storage.compile_ahead(methods, chosen, place)
        for shape in chosen:
            report["rows"] += race(shape, methods, place, rounds if timed else 0, toy, wrong, speed)
            write(report, out)
        if variants:
            varied = [method for method in VARIED if method in methods] or list(methods[:1])
            report["rows"] += variants_of(varied, place, rounds if timed else 0, toy, speed, wrong)
            write(report, out)
            packed = [method for method in PACKED if method in methods] or list(methods[:1])
            report["packing"] = packing(
                packed, place, rounds if timed else 0, toy, device_time.copy_bandwidth(place) if timed else None
            )
    write(report, out)
    _print(report, as_json)
    if plot:
        from benchmarks.roofline import draw

        draw(report, plot)
    return report


def race(
    shape: Shape,
    methods: Sequence[str],
    device: torch.device,
    rounds: int,
    toy: bool,
    wrong: dict[str, str],
    speed: float | None,
) -> list[dict]:
    """All contenders of a shape. Others share their keys and values; ours hold their own."""
    plain, made, rows = None, [], []
    needed = 3 * 2 * shape.elements  # what is shared, and what is laid out otherwise for one or two of them
    if toy or needed < free(device):
        plain = Plain.make(shape, device, toy)
        others = kernel_contenders.half_precision(plain)
    else:
        reason = f"its fp16 keys and values take {2 * shape.elements / 2**30:.0f} GiB, which do not fit with copies"
        rows.append({"shape": str(shape), "contender": FP16, "device": device_time.label(device), "failed": reason})
        others = ()
    for name, kind, make in others:
        _admit(name, kind, make, shape, device, made, rows)
    for method in methods:
        _admit_ours(method, shape, device, toy, wrong, made, rows)
    rows += _rows(shape, made, device, rounds, speed)
    del made, plain, others
    _settle(device)
    return rows


def variants_of(
    methods: Sequence[str],
    device: torch.device,
    rounds: int,
    toy: bool,
    speed: float | None,
    wrong: dict[str, str] | None = None,
) -> list[dict]:
    """Ours with pages in order, with pages anywhere, and with rows of any length, timed in turn."""
    found: list[dict] = []
    shape = Shape.parse(TOY_VARIANT if toy else VARIANT)
    for method in methods:
        made: list[Runner] = []
        for variant in ("", "shuffled", "ragged"):
            _admit_ours(
                method, replace(shape, variant=variant), device, toy, wrong or {}, made, found, variant or "in order"
            )
        rows = _rows(shape, made, device, rounds, speed)
        base = next((row.get("median us") for row in rows if row["variant"] == "in order"), None)
        for row in rows:
            if base and "median us" in row:
                row["x in order"] = row["median us"] / base
        found += rows
        del made
        _settle(device)
    return found


def _admit_ours(
    method: str,
    shape: Shape,
    device: torch.device,
    toy: bool,
    wrong: dict[str, str],
    made: list[Runner],
    rows: list[dict],
    variant: str = "",
) -> None:
    def make() -> Runner:
        if method in wrong:
            raise RuntimeError(f"gate: {wrong[method]}")
        return kernel_contenders.ours(method, shape, device, toy)

    _admit(f"kvist {method}", OURS, make, shape, device, made, rows, variant)


def _admit(
    name: str,
    kind: str,
    make: Callable[[], Runner],
    shape: Shape,
    device: torch.device,
    made: list,
    rows: list[dict],
    variant: str = "",
) -> None:
    """A contender that can be had and is right, or a row that says why not."""
    try:
        contender = make()
        contender.named()
        made.append((contender, contender.error(), variant))
    except Exception as reason:
        row = {"shape": str(shape), "contender": name, "kind": kind, "device": device_time.label(device)}
        if variant:
            row["variant"] = variant
        rows.append(row | {"failed": kernel_gate.first_line(reason)})
        _settle(device)


def _rows(shape: Shape, made: Iterable, device: torch.device, rounds: int, speed: float | None) -> list[dict]:
    """What is known of each contender, with times if there are rounds."""
    rows, replays = [], {}
    for i, (contender, error, variant) in enumerate(made):
        row = {
            "shape": str(shape),
            "contender": contender.name,
            "kind": contender.kind,
            "kernel": contender.kernel,
            "device": device_time.label(device),
            "error": error,
            "MB": contender.nbytes / UNITS["MB"],
            "bits/element": 8 * contender.nbytes / shape.elements,
        }
        rows.append(row | ({"variant": variant} if variant else {}))
        if rounds:
            try:
                replays[str(i)] = device_time.Replay(contender.turns)
            except Exception as reason:
                rows[-1]["failed"] = f"capture: {kernel_gate.first_line(reason)}"
    if rounds:
        for i, taken in device_time.interleaved(replays, rounds).items():
            _note(rows[int(i)], device_time.spread(taken), speed or float("nan"))
        _compare(rows)
    return rows


def _note(row: dict, times: dict[str, float], speed: float) -> None:
    """Times, the bandwidth at which bytes were read, and how many times the least time that the bytes need."""
    seconds = times["median us"] / 1e6
    nbytes = row["MB"] * UNITS["MB"]
    row |= times | {"GB/s": nbytes / seconds / UNITS["GB/s"], "x floor": seconds * speed / nbytes}


def _compare(rows: list[dict]) -> None:
    """How many times faster than the best fp16 and the best FP8 contender of these rows."""
    for kind in (FP16, FP8):
        best = min((row["median us"] for row in rows if row["kind"] == kind and "median us" in row), default=None)
        for row in rows:
            if best is not None and "median us" in row:
                row[f"x {kind}"] = best / row["median us"]


def _settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _print(report: dict, as_json: bool) -> None:
    if as_json:
        return show(report, as_json)
    show(
        {"title": "Gate: largest error, over the decoded cache", "rows": [_brief(row) for row in report["gates"]]},
        False,
    )
    show(report | {"rows": [_brief(row) for row in report["rows"]]}, False)
    if report["packing"]:
        show({"title": "Packing", "rows": report["packing"]}, False)
    return print("\n".join(sentences(report)))


def _brief(row: dict) -> dict:
    """A row as a table shows it."""
    row = {name: value for name, value in row.items() if name not in ("kind", "device", "p10 us", "p90 us")}
    return row | ({"error": f"{row['error']:.1e}"} if "error" in row else {})


def sentences(report: dict) -> list[str]:
    """What the table cannot say."""
    rows = [row for row in report["rows"] if "median us" in row]
    if not rows:
        return ["Without a GPU nothing is timed: the kernels ran in an interpreter or as CPU code, at toy sizes."]
    ours = [row["x fp16"] for row in rows if row["kind"] == OURS and "x fp16" in row]
    lines = [
        f"Device time by graph replay, medians of {report['settings']['rounds']} rounds in turn; plain read "
        f"{report['read GB/s']:.0f} GB/s. x floor: time over what reading the bytes at that speed takes.",
    ]
    if ours:
        lines.append(f"x fp16, of ours: {min(ours):.2f} to {max(ours):.2f}, median {statistics.median(ours):.2f}.")
    return lines
