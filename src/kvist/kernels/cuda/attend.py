"""The host's side of `cuda/decode.cu`: which cells it serves, its compilation at run time, and its launch.

NVRTC (a wheel, no toolkit) compiles the kernel once per process, device and shape; nothing is built at install.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvist.kernels.contract import Decode, Exact, Stored, Traits
from kvist.kernels.cuda.serves import DIM, TYPES
from kvist.kernels.guard import on_its_device

FOLDER = Path(__file__).parent
SOURCE, HEADERS = FOLDER / "decode.cu", ("packed.cuh", "page.cuh", "layout.cuh", "primitives.cuh")
LOOSE = 64  # exact tokens per block
SHARED = 70 << 10  # bytes of a block's pages at most, so that three blocks share a multiprocessor
STATIC = 5 << 10  # bytes of shared memory beside them
WARPS = 12  # per multiprocessor: what their registers leave room for


class Cell(NamedTuple):
    """What the kernel is compiled for: the macros of `decode.cu`."""

    KB: int
    VB: int
    KG: int
    VG: int
    PAGE: int
    HEADS: int
    ROWS: int
    QUERIES: int
    TYPE: int
    SOFTCAP: int = 0
    LOGIT: int = 0

    @property
    def page_bytes(self) -> int:
        """Of one page and head in shared memory."""
        codes = self.PAGE * DIM * (self.KB + self.VB) // 8
        return codes + 4 * (self.PAGE // self.KG * DIM + self.PAGE * DIM // self.VG)

    @property
    def warps(self) -> int:
        return 4 if 8 * self.page_bytes <= SHARED else 2

    @property
    def stages(self) -> int:
        """Pages under way per warp."""
        return max(2, min(4, SHARED // (self.warps * self.page_bytes)))

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block: its pages, and later its warps' parts."""
        return max(self.warps * self.stages * self.page_bytes, self.warps * 8 * DIM * 4)


def cell(key: Traits, value: Traits, q: Tensor, heads: int, call: Decode) -> Cell:
    """The cell of a call that `serves` has let through."""
    groups = key.group, value.group or DIM
    rows = q.shape[1] // heads * q.shape[2]
    extras = int(bool(call.softcap)), int(call.sink is not None)
    return Cell(key.bits, value.bits, *groups, call.page, heads, rows, q.shape[2], TYPES.index(q.dtype), *extras)


def compiled(made: Cell, arch: int, ptx: bool = False) -> bytes:
    """Machine code for sm_`arch`, or PTX; needs NVRTC and no GPU. Raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue]

    macros = made._asdict() | {"WARPS": made.warps, "STAGES": made.stages, "LOOSE": LOOSE, "BULK": int(arch >= 90)}
    options = [f"-D{name}={number}" for name, number in macros.items()]
    options += [f"--gpu-architecture={'compute' if ptx else 'sm'}_{arch}", "--std=c++17"]
    headers, names = [(FOLDER / name).read_bytes() for name in HEADERS], [name.encode() for name in HEADERS]
    source = SOURCE.read_bytes(), SOURCE.name.encode()
    _, program = _ok(nvrtc.nvrtcCreateProgram(*source, len(names), headers, names))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    if int(failed):
        log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program))[1]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{SOURCE.name} does not compile for sm_{arch}: {log.decode(errors='replace')}")
    size, get = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if ptx else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    code = b" " * _ok(size(program))[1]
    _ok(get(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _ok(answer: tuple) -> tuple:
    if int(answer[0]):
        raise RuntimeError(f"the CUDA driver or compiler refused: {answer[0]!r}")
    return answer


@cache
def _function(made: Cell, device: int):
    """The kernel, loaded on a device."""
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    major, minor = torch.cuda.get_device_capability(device)
    _, module = _ok(driver.cuModuleLoadData(compiled(made, 10 * major + minor)))
    _, function = _ok(driver.cuModuleGetFunction(module, b"decode"))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _ok(driver.cuFuncSetAttribute(function, attribute, made.shared))
    return function


class Side(ctypes.Structure):
    """`Side` of `decode.cu`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "offset", "table", "sinks", "ring")]


class Call(ctypes.Structure):
    """`Call` of `decode.cu`: the kernel's only argument."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "part", "top", "sum", "counters")),
        ("k", Side),
        ("v", Side),
        ("state", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("k_width", "v_width", "sinks", "capacity", "loose", "parts")),
    ]


def _side(stored: Stored, exact: Exact) -> Side:
    arrays = (stored.arrays[name] for name in ("codes", "scale", "offset"))
    return Side(*(x.data_ptr() for x in (*arrays, stored.table, exact.sinks, exact.ring)))


def described(
    q: Tensor, out: Tensor, scratch: Tensor, sides: tuple[Side, Side], call: Decode, sink: Tensor | None,
    widths: tuple[int, int], held: tuple[int, int], parts: tuple[int, int],
) -> Call:  # fmt: skip
    """The kernel's argument. held: sinks and ring slots; parts: of loose tokens, and all."""
    cells = scratch.numel() // (8 * (DIM + 2))
    top, total, part = scratch.split_with_sizes([8 * cells, 8 * cells, 8 * cells * DIM])
    pointers = (x.data_ptr() for x in (q, out, part, top, total, call.counters))
    logits = 0 if sink is None else sink.data_ptr()
    numbers = call.scale, call.softcap or 0.0
    return Call(*pointers, *sides, call.state.data_ptr(), logits, *numbers, *widths, *held, *parts)


def prepared(
    made: Cell, q: Tensor, k: Stored, v: Stored, k_exact: Exact, v_exact: Exact, call: Decode, splits: int
) -> tuple[Call, Tensor, tuple]:
    """The argument, the output, and what must live until the launch is made."""
    cells, rings = q.shape[0] * made.HEADS, (k_exact.sinks.shape[2], k_exact.ring.shape[2])
    loose = -(-sum(rings) // LOOSE)
    parts = loose + splits
    q, out = q.contiguous(), torch.empty(*q.shape, dtype=q.dtype, device=q.device)
    scratch = torch.empty(cells * parts * 8 * (DIM + 2), dtype=torch.float32, device=q.device)
    sink = None if call.sink is None else call.sink.float().contiguous()
    sides = _side(k, k_exact), _side(v, v_exact)
    widths = k.table.shape[1], v.table.shape[1]
    argument = described(q, out, scratch, sides, call, sink, widths, rings, (loose, parts))
    return argument, out, (q, scratch, sink)


@on_its_device
def decode(
    key: Traits, value: Traits, q: Tensor, k: Stored, v: Stored, k_exact: Exact, v_exact: Exact, call: Decode
) -> Tensor:
    """See `choose`: STEP, of a request that `serves` lets through."""
    made = cell(key, value, q, k_exact.ring.shape[1], call)
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    device, cells = q.device, q.shape[0] * made.HEADS
    pages = max(1, min(k.table.shape[1], v.table.shape[1]))
    chip = torch.cuda.get_device_properties(device)
    resident = max(1, min(chip.shared_memory_per_multiprocessor // (made.shared + STATIC), WARPS // made.warps))
    splits = max(1, min(-(-pages // made.warps), -(-resident * chip.multi_processor_count // cells)))
    argument, out, _alive = prepared(made, q, k, v, k_exact, v_exact, call, splits)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    function, stream = _function(made, device.index or 0), torch.cuda.current_stream(device).cuda_stream
    grid, block = (argument.parts, cells, 1), (32 * made.warps, 1, 1)
    _ok(driver.cuLaunchKernel(function, *grid, *block, made.shared, stream, ctypes.addressof(pointers), 0))
    return out
