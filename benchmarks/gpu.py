"""Everything that wants a GPU, as one command within a few minutes: checks, then benchmarks, the most asked first.

Each stage is a process of its own with a limit, so that a crash or a hang costs that stage alone; what it found is
written as it goes. Nothing is built. On a CPU all of it runs at toy sizes, in this process, and times nothing.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import device_time, end_to_end, goals, headline, kernel_gate, kernels
from kvist.atomic import replacing
from kvist.bench.table import show, write

LEAST = 15  # seconds without which no stage is begun
TESTS = [Path("tests/kernels") / f"test_{name}.py" for name in ("decode_triton", "straight", "captured")]
TOY_METHODS = ("kivi:2",)
GATE, DONE = "gate", "done"


def environment(path: Path, device: str, methods: Sequence[str]) -> None:
    """What it runs on, and how fast a copy is there."""
    place = torch.device(device)
    report = {"title": "Environment", "machine": device_time.describe(place), "rows": []}
    if place.type == "cuda":
        report["copy GB/s"] = device_time.copy_bandwidth(place) / 1e9
    write(report, path)


def unpack(path: Path, device: str, methods: Sequence[str]) -> None:
    """Both bodies of the unpacking helper on every half-word there is."""
    if torch.device(device).type != "cuda":
        return write({"rows": [], "skipped": "inline PTX needs a GPU"}, path)
    from kvist.kernels.triton.unpack import compare_all

    compare_all()
    return write({"rows": [{"check": "unpacking, inline PTX and plain, 2^16 half-words", "met": "yes"}]}, path)


def gate(path: Path, device: str, methods: Sequence[str]) -> None:
    """Whether methods are right; one file for all that are asked for together."""
    place = torch.device(device)
    found: list[dict] = []

    def note(row: dict) -> None:
        write({"rows": [*found, row]}, path)

    for method in methods:
        found.append(kernel_gate.gate(method, place, place.type != "cuda", note=note))
        write({"rows": found}, path)


def kernel_times(path: Path, device: str, methods: Sequence[str]) -> None:
    """Decode attention of one layer, with what the gates said."""
    gates = [row for file in sorted(path.parent.glob(f"{GATE}*.json")) for row in json.loads(file.read_text())["rows"]]
    known = {row["method"] for row in gates}
    gates += [{"method": method, "unfinished": True} for method in methods if method not in known]
    drawn = device.startswith("cuda") and importlib.util.find_spec("matplotlib")
    plot = path.with_suffix(".png") if drawn else None
    kernels.run(methods=methods, device=device, variants=False, gates=gates, out=path, plot=plot)


def variants(path: Path, device: str, methods: Sequence[str]) -> None:
    """Pages anywhere, ragged batches, packing."""
    place = torch.device(device)
    timed = place.type == "cuda"
    copied = device_time.copy_bandwidth(place) if timed else None
    report: dict = {"title": "Pages, ragged batches, packing", "machine": device_time.describe(place), "rows": []}
    rounds, chosen = kernels.ROUNDS if timed else 0, [text for text in kernels.VARIED if text in methods]
    with torch.no_grad():
        report["packing"] = kernels.packing(
            [t for t in kernels.PACKED if t in methods], place, rounds, not timed, copied
        )
        write(report, path)
        speed = device_time.read_bandwidth(place) if timed else None
        report["rows"] = kernels.variants_of(chosen, place, rounds, not timed, speed)
    write(report, path)


def _model_stage(run: Callable, path: Path, device: str, methods: Sequence[str]) -> None:
    chosen = [method for method in end_to_end.METHODS if method in methods]
    write(run(methods=chosen, device=device, note=lambda report: write(report, path)), path)


def longest(path: Path, device: str, methods: Sequence[str]) -> None:
    """The memory headline."""
    write(headline.run(device=device, note=lambda report: write(report, path)), path)


def tests(path: Path, device: str, methods: Sequence[str]) -> None:
    """The kernel tests, compiled and not interpreted, where pytest and the tests are at hand."""
    if (
        torch.device(device).type != "cuda"
        or not all(test.is_file() for test in TESTS)
        or importlib.util.find_spec("pytest") is None
    ):
        return write({"rows": [], "skipped": "they need a GPU, pytest, and the repository's root as the folder"}, path)
    command = (sys.executable, "-m", "pytest", *map(str, TESTS), "-q", "-k", "ordinary or not test_captured", "-p")
    there = {**os.environ, "KVIST_TEST_DEVICE": "cuda"}
    done = subprocess.run((*command, "no:cacheprovider"), capture_output=True, text=True, env=there)
    passed = "yes" if done.returncode == 0 else "no"
    report = {"rows": [{"check": "kernel tests on the GPU", "met": passed}], "tail": done.stdout.splitlines()[-40:]}
    return write(report, path)


# name: what runs, and the most seconds that it may take; in the order of what is asked most
STAGES: dict[str, tuple[Callable[[Path, str, Sequence[str]], None], int]] = {
    "environment": (environment, 60),
    "unpack": (unpack, 60),
    GATE: (gate, 75),
    "kernels": (kernel_times, 110),
    "headline": (longest, 110),
    "captured": (partial(_model_stage, end_to_end.captured), 60),
    "generate": (partial(_model_stage, end_to_end.generate), 50),
    "variants": (variants, 60),
    "tests": (tests, 40),
}


# what `make gpu-check` and so on run: each fits into two minutes and is useful alone
PLANS = {
    "check": ("environment", "unpack", GATE, "tests"),
    "kernels": ("environment", "kernels"),
    "models": ("environment", "captured", "generate"),
    "headline": ("environment", "headline"),
    "all": tuple(STAGES),
}


def run(
    out_dir: str | Path = "runs/gpu",
    budget_seconds: float = 480,
    device: str = "auto",
    methods: Sequence[str] = (),
    plan: str = "all",
    as_json: bool = False,
) -> dict:
    """The stages of a plan that the budget allows; a JSON file of each in `out_dir`, and a summary of all that lie
    there, of earlier calls too, against the goals. Raises ValueError for an unknown plan."""
    if plan not in PLANS:
        raise ValueError(f"plans are {', '.join(PLANS)}, found {plan!r}")
    wanted = [name for name in PLANS[plan] if name in STAGES]
    folder, start = Path(out_dir), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    isolated = torch.device(device).type == "cuda"
    methods = methods or (kernels.METHODS if isolated else TOY_METHODS)
    for old in folder.glob("*.json"):
        if old.stem.split("-")[0] in wanted:
            old.unlink()  # of an earlier run: a stage that is skipped must not look done
    reports: dict[str, dict] = {name: _read(folder, name) for name in STAGES if name not in wanted}
    stages = []
    for name in wanted:
        stage, most = STAGES[name]
        left = budget_seconds - (time.monotonic() - start)
        begun = time.monotonic()
        if left < LEAST:
            state = "skipped: the budget is spent"
        elif isolated:
            state = _apart(name, folder, device, methods, min(most, left))
        else:
            state = _here(stage, folder / f"{name}.json", device, methods)
        reports[name] = _read(folder, name)
        row = {"stage": name, "state": reports[name].get("skipped") or state}
        stages.append(row | ({"s": round(time.monotonic() - begun, 1)} if isolated else {}))
        print(f"{name}: {row['state']}", file=sys.stderr, flush=True)
        summary = {"title": "Goals", "stages": stages, "rows": goals.judge(reports)}
        write(summary | {"machine": reports["environment"].get("machine")}, folder / "summary.json")
        with replacing(folder / "SUMMARY.md") as scratch:
            scratch.write_text(goals.page(summary["rows"], reports))
    show(summary, as_json)
    if not as_json:
        show({"title": "Stages", "rows": stages}, False)
    return summary | {"reports": reports}


def _here(stage: Callable, path: Path, device: str, methods: Sequence[str]) -> str:
    try:
        stage(path, device, methods)
    except Exception as reason:
        return f"failed: {kernel_gate.first_line(reason)}"
    return DONE


def _apart(name: str, folder: Path, device: str, methods: Sequence[str], most: float) -> str:
    """A stage in processes of its own: one, or one per method of the gate, which compiles for most of its time."""
    jobs = {f"{name}-{i}": [method] for i, method in enumerate(methods)} if name == GATE else {name: list(methods)}
    on_gpu = torch.device(device).type == "cuda"
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET" or not on_gpu}
    running = {}
    for job, chosen in jobs.items():
        command = (sys.executable, "-m", "benchmarks.gpu", name, str(folder / f"{job}.json"), device, *chosen)
        log = (folder / f"{job}.log").open("w")
        running[job] = subprocess.Popen(command, stdout=log, stderr=log, env=known, start_new_session=True)
        log.close()
    end, states = time.monotonic() + most, []
    for job, process in running.items():
        try:
            code = process.wait(max(0.1, end - time.monotonic()))
            if code:
                states.append(f"{job} failed: {_last_line(folder / f'{job}.log')}")
                if name == GATE:  # so that nobody runs it again in a process that others share
                    write({"rows": [{"method": jobs[job][0], "failed": states[-1]}]}, folder / f"{job}.json")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own children, too
            process.wait()
            states.append(f"{job} stopped after {most:.0f} s")
    return "; ".join(states) or DONE


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no word"


def _read(folder: Path, name: str) -> dict:
    """What a stage wrote, whole or in part; the gate's processes wrote a file each."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}*.json"))]
    if len(found) > 1:
        return {"rows": [row for report in found for row in report["rows"]]}
    return found[0] if found else {}


if __name__ == "__main__":
    stage_name, target, place, *texts = sys.argv[1:]
    STAGES[stage_name][0](Path(target), place, texts)
