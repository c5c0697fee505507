"""Time on the device itself: CUDA graphs replayed in turn, over copies of the data that its cache cannot hold."""

import os
import random
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kvist.bench.table import machine

COLD = 200 << 20  # bytes that copies hold together, so that the second-level cache serves none of them
LEAST = 16  # calls of a replay: the clock's steps and the launch of a graph count little
CAP, FEWEST = 1.0, 3  # seconds of a contender's rounds at most, and rounds at least
READ = 2 << 30  # bytes of the read that bandwidth is measured with
COPY = 1 << 30  # bytes of the copy that bandwidth is measured with
QUERY = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader")


def describe(device: torch.device) -> dict:
    """What it ran on, the GPU included."""
    found = machine() | {"device": label(device)}
    try:
        import triton

        found["triton"] = triton.__version__
    except ModuleNotFoundError:
        found["triton"] = "not installed"
    if device.type != "cuda":
        return found
    known = torch.cuda.get_device_properties(device)
    found |= {"gpu": known.name, "multiprocessors": known.multi_processor_count, "gpu bytes": known.total_memory}
    found |= {"cuda": torch.version.cuda, "capability of gpu": list(torch.cuda.get_device_capability(device))}
    if shutil.which(QUERY[0]):
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
        found["driver, clocks (SM, most, memory)"] = answer[device.index or 0].strip() if answer else "unknown"
    return found


def label(device: torch.device) -> str:
    """How rows name a device. A CPU's rows are of the interpreter where Triton is told to use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else device.type


def copies_for(nbytes: int) -> int:
    """Copies of `nbytes` that together exceed what a GPU's cache could serve."""
    return max(1, -(-COLD // max(1, nbytes)))


class Replay:
    """A graph of calls that take turns over copies of the data; `calls` of them in all."""

    def __init__(self, turns: Sequence[Callable[[], object]]):
        rounds = max(1, -(-LEAST // len(turns)))
        self.calls = rounds * len(turns)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for turn in turns:  # compile, and make what is made once
                turn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph, self.kept = torch.cuda.CUDAGraph(), turns
        with torch.cuda.graph(self.graph):
            for _ in range(rounds):
                for turn in turns:
                    turn()
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self) -> float:
        """One replay, per call."""
        self.start.record()
        self.graph.replay()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3 / self.calls


def interleaved(replays: Mapping[str, Replay], rounds: int, seed: int = 0, cap: float = CAP) -> dict[str, list[float]]:
    """Seconds per call of every contender, `rounds` times, each round in an order of its own. cap: seconds that one
    contender may take in all; a slow one gets fewer rounds, FEWEST at least."""
    order, draw = list(replays), random.Random(seed)
    most = {name: max(FEWEST, int(cap / (x.seconds() * getattr(x, "calls", 1)))) for name, x in replays.items()}
    times: dict[str, list[float]] = {name: [] for name in order}
    for i in range(rounds):
        draw.shuffle(order)
        for name in order:
            if i < most[name]:
                times[name].append(replays[name].seconds())
    return times


def kernel_of(turn: Callable[[], object], words: Sequence[str]) -> str:
    """The name of the kernel that takes most of a call's time on the device among those that hold one of `words`.
    Raises RuntimeError where none does."""
    turn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        turn()
        torch.cuda.synchronize()
    found = sorted((event.device_time_total, event.key) for event in seen.key_averages())
    fitting = [name for _, name in found if any(word in name.lower() for word in words)]
    if not fitting:
        longest = found[-1][1] if found else "nothing"
        raise RuntimeError(f"{longest} ran where a kernel of {' or '.join(words)} was asked for")
    return fitting[-1]


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and the tenths at both ends, in microseconds."""
    ordered = sorted(1e6 * t for t in times)
    edge = len(ordered) // 10
    return {"median us": statistics.median(ordered), "p10 us": ordered[edge], "p90 us": ordered[-1 - edge]}


def read_bandwidth(device: torch.device, rounds: int = 10) -> float:
    """Bytes per second that a plain sum reads: the floor of what only reads."""
    source = torch.zeros(READ // 8, dtype=torch.int64, device=device)
    replay = Replay([source.sum])
    replay.seconds()
    return READ / statistics.median(replay.seconds() for _ in range(rounds))


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Bytes read and written per second by a plain copy: what a stream of bytes can reach."""
    source = torch.empty(COPY // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def turn() -> Tensor:
        return target.copy_(source)

    replay = Replay([turn])
    replay.seconds()
    return COPY / statistics.median(replay.seconds() for _ in range(rounds))
