"""The type that a model computes in on a CPU, and the type in which its exact tokens are then kept.

Most processors multiply 16-bit numbers more slowly than fp32 ones: they convert them first. Those that have
instructions for them are asked, and timed, because some have them and are slower all the same.
"""

import json
import os
import time
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvist.atomic import write_json
from kvist.models.find import cache_home

NATIVE = {  # what torch can be asked; a name that a release lacks is a no
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
ROOM = 1.25  # of the weights in fp32, with what a run needs beside them
SIZE, ROUNDS = (256, 1024, 1024), 5  # of the matrix product that is timed
_KEPT: WeakKeyDictionary = WeakKeyDictionary()


def keep(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Note that caches of `model` keep exact tokens in `dtype` where they pack, the type its weights were saved in;
    None: as the model computes."""
    if dtype is None:
        _KEPT.pop(model, None)
    else:
        _KEPT[model] = dtype


def kept(model: nn.Module) -> torch.dtype | None:
    """What `keep` noted; None where nothing was, or where it is what the model computes in."""
    noted = _KEPT.get(model) if isinstance(model, nn.Module) else None
    return None if noted == getattr(model, "dtype", None) else noted


def suit(model: nn.Module, free: int) -> nn.Module:
    """A model on a CPU, as it was saved, made to compute in what is fast there; caches keep exact tokens as it was
    saved. One whose weights are quantized stays as it is. `free`: bytes of memory that may be taken."""
    saved = model.dtype
    kind = fast(saved, sum(weight.numel() for weight in model.parameters()), free)
    if kind == saved or getattr(model, "hf_quantizer", None) is not None:
        return model
    model = model.to(kind)
    model.config.dtype = kind
    keep(model, saved)
    return model


def fast(saved: torch.dtype, elements: int, free: int) -> torch.dtype:
    """The type for a CPU to compute in, for a model of so many weights saved as `saved`, with `free` bytes of memory:
    fp32, unless the processor is faster in `saved` or there is no room."""
    if saved not in NATIVE or 4 * ROOM * elements > free or quick(saved):
        return saved
    return torch.float32


@cache
def quick(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for a 16-bit type and is faster with them than in fp32. Measured once,
    and remembered in the user's cache."""
    if not any(getattr(torch.cpu, name, bool)() for name in NATIVE[dtype]):
        return False
    file = cache_home() / "processor.json"
    key = f"{dtype} torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {_processor()}"
    known = _read(file)
    if key not in known:
        known[key] = _faster(dtype)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
        except (OSError, ValueError):
            pass  # measured again the next time
    return known[key]


def _faster(dtype: torch.dtype) -> bool:
    """Whether a matrix product takes less time than in fp32; the best of a few, in turn."""
    rows, inner, columns = SIZE
    best = {dtype: float("inf"), torch.float32: float("inf")}
    for _ in range(ROUNDS):
        for kind in best:
            x, weight = torch.ones(rows, inner, dtype=kind), torch.ones(columns, inner, dtype=kind)
            start = time.perf_counter()
            nn.functional.linear(x, weight)
            best[kind] = min(best[kind], time.perf_counter() - start)
    return best[dtype] < best[torch.float32]


def _read(file: Path) -> dict[str, bool]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, bool)} if isinstance(found, dict) else {}


def _processor() -> str:
    """The processor's name, where the system tells it, and its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, 'unknown')}, {os.cpu_count()} cores"
