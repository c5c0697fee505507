"""How much memory is free, and how much a piece of work held at its worst."""

import ctypes
import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

CGROUPS = Path("/sys/fs/cgroup")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SLACK = 64 << 20  # bytes: a mark that stands higher above the resident set than this was not reset
T = TypeVar("T")


def free(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now; on a CPU never more than the process's control group is allowed.

    Raises ValueError where the system does not tell.
    """
    if device.type == "cuda":
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + spare
    return min(_available(), *_allowances())


def _available() -> int:
    try:
        import psutil
    except ModuleNotFoundError:
        found = _fields(Path("/proc/meminfo")).get("MemAvailable")
        if found is None:
            raise ValueError("this system does not tell how much memory is free; install psutil") from None
        return found
    return psutil.virtual_memory().available


def _allowances(root: Path = CGROUPS, mine: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left below the limit of each control group that the process is in, version 2 or 1."""
    try:
        lines = [line.split(":", 2) for line in mine.read_text().splitlines()]
    except OSError:
        lines = []
    found = []
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        base = root / controllers
        files = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        inside = base / path.lstrip("/")
        for group in [inside, *inside.parents]:
            if not group.is_relative_to(base):
                break
            try:
                limit, used = ((group / f"memory.{name}").read_text().strip() for name in files)
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.isdigit():  # what files left in memory is given back when asked for
                found.append(max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0))))
    return found or [sys.maxsize]


def peak(work: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What `work()` returns, and the bytes it held at its worst beyond what was held before: allocations on CUDA, the
    resident set of the process on Linux; None where the system does not tell."""
    settle()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        done = work()
        return done, torch.cuda.max_memory_allocated(device) - before
    before = _reset()
    done = work()
    return done, None if before is None else max(0, _fields(STATUS)["VmHWM"] - before)


def settle() -> None:
    """Give back what nobody uses, so that the next measurement starts level."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> int | None:
    """Lower the resident set's high-water mark to what is resident now, and return that; None where it stays."""
    try:
        RESET.write_text("5")
        fields = _fields(STATUS)
    except OSError:
        return None
    resident, mark = fields.get("VmRSS"), fields.get("VmHWM")
    return resident if resident is not None and mark is not None and mark - resident < SLACK else None


def _fields(path: Path) -> dict[str, int]:
    """The sizes in a file of lines such as `VmRSS:  1024 kB`, in bytes."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
