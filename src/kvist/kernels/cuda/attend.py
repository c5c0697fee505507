"""The host's side of `cuda/decode.cu`: which cells it serves, its compilation at run time, and its launch.

NVRTC (a wheel, no toolkit) compiles the kernel once per process, device and shape; nothing is built at install.
"""

import ctypes
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvist.kernels.contract import Decode, Exact, Stored, Traits
from kvist.kernels.guard import on_its_device

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "decode.cu"
HEADERS = tuple(
    f"{name}.cuh" for name in ("packed", "queries", "deal", "exact", "page", "codes", "layout", "primitives")
)
STATIC = 7 << 10  # bytes of shared memory of a block beside its rings, at most, and what the device takes itself
MULTIPROCESSOR = 227 << 10  # bytes of shared memory of a multiprocessor, as sm_90 and sm_100 have
MOST_SPAN = 6 << 10  # bytes: what two stages of 16 warps leave room for
TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tuning(NamedTuple):
    """How a cell is laid out. span: tokens of a packed page that a warp fetches at a time; stages: of its ring; warps
    of a block; blocks: that a multiprocessor holds at once, by registers and shared memory; copies: see `layout.cuh`.
    """

    span: int
    stages: int
    warps: int = 8
    blocks: int = 2
    copies: int = 1


class Cell(NamedTuple):
    """What the kernel is compiled for: the macros of the sources."""

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
    D: int = 128
    KR: int = 0
    KA: int = 0
    VA: int = 0
    KT: int = 0
    VT: int = 0
    TURN: int = 0

    def span_bytes(self, span: int) -> int:
        """Of `span` tokens of one head in shared memory."""
        codes = span * self.D * (self.KB + self.VB) // 8
        keys = max(1, span // self.KG) * self.D if self.KR == 0 else span if self.KR == 1 else 0
        return codes + 4 * (keys + span * self.D // self.VG)

    @property
    def tuning(self) -> Tuning:
        """Two spans and more under way in each of 16 warps, where shared memory allows: they hide what copies take."""
        span = next(n for n in (64, 32, 16) if n == 16 or self.span_bytes(n) <= MOST_SPAN)
        stages = max(2, min(4, (MULTIPROCESSOR // 2 - STATIC) // (8 * self.span_bytes(span))))
        copies = 1
        if span == 64 and self.KR == 0:  # measured on an H200: many small ranges ride better in pieces
            copies = 0 if self.KG == 32 else 2
        return Tuning(span, stages, copies=copies)

    def shared(self, tuning: Tuning, blocks: int = 0) -> int:
        """Bytes of dynamic shared memory of a block: its rings, and later its warps' parts or those of `blocks`."""
        rings = tuning.warps * tuning.stages * self.span_bytes(tuning.span)
        parts = (tuning.warps + 1) * self.ROWS * self.D * 4
        merged = 4 * (blocks * self.ROWS + 4 + self.ROWS * self.D + max(128 * tuning.warps, self.ROWS * self.D))
        return max(rings, parts, merged)


def cell_of(key: Traits, value: Traits, q: Tensor, heads: int, call: Decode) -> Cell:
    """The cell of a call that `serves` has let through."""
    dim = q.shape[3]
    return Cell(
        key.bits, value.bits, key.group if key.along == "tokens" else 32, value.group or dim, call.page, heads,
        q.shape[1] // heads * q.shape[2], q.shape[2], TYPES.index(q.dtype),
        SOFTCAP=int(bool(call.softcap)), LOGIT=int(call.sink is not None), D=dim,
        KR=2 if key.range == "fixed" else int(key.along == "channels"), KA=int(key.across_heads),
        VA=int(value.across_heads), KT=int(key.levels == "table"), VT=int(value.levels == "table"),
        TURN=int(key.hadamard),
    )  # fmt: skip


def macros_of(tuning: Tuning) -> dict[str, int]:
    """As the sources call them."""
    return {name.upper(): number for name, number in tuning._asdict().items()}


@cache
def compiled(cell: Cell, arch: int, ptx: bool = False, tuning: Tuning | None = None, counted: bool = False) -> bytes:
    """Machine code for sm_`arch`, or PTX; needs NVRTC and no GPU. counted: of whole packed spans alone, which is no
    kernel. Raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue]

    tuning = tuning or cell.tuning
    macros = cell._asdict() | macros_of(tuning if arch >= 90 else tuning._replace(copies=0)) | {"COUNTED": int(counted)}
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


def compile_ahead(cells: Iterable[Cell], arch: int) -> None:
    """Compile several cells side by side; what fails is told when it is asked for."""
    with ThreadPoolExecutor() as pool:
        for task in [pool.submit(compiled, cell, arch) for cell in dict.fromkeys(cells)]:
            task.exception()


def _ok(answer: tuple) -> tuple:
    if int(answer[0]):
        raise RuntimeError(f"the CUDA driver or compiler refused: {answer[0]!r}")
    return answer


def fitted(cell: Cell, tuning: Tuning, block: int, multiprocessor: int) -> Tuning:
    """As many warps and blocks as shared memory holds: bytes of a block and of a multiprocessor, at most."""
    while tuning.warps > 1 and cell.shared(tuning) + STATIC > block:
        tuning = tuning._replace(warps=tuning.warps // 2)
    return tuning._replace(blocks=max(1, min(tuning.blocks, multiprocessor // (cell.shared(tuning) + STATIC))))


class Loaded(NamedTuple):
    """The kernel on a device, and how it is launched there."""

    function: object
    tuning: Tuning
    grid: int
    shared: int


@cache
def _loaded(cell: Cell, device: int, tuning: Tuning | None = None) -> Loaded:
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    chip = torch.cuda.get_device_properties(device)
    most = chip.shared_memory_per_block_optin, chip.shared_memory_per_multiprocessor
    tuning = fitted(cell, tuning or cell.tuning, *most)
    grid = chip.multi_processor_count * tuning.blocks
    shared = cell.shared(tuning, grid)
    major, minor = torch.cuda.get_device_capability(device)
    _, module = _ok(driver.cuModuleLoadData(compiled(cell, 10 * major + minor, tuning=tuning)))
    _, function = _ok(driver.cuModuleGetFunction(module, b"decode"))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _ok(driver.cuFuncSetAttribute(function, attribute, shared))
    return Loaded(function, tuning, grid, shared)


class Side(ctypes.Structure):
    """`Side` of the sources."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("codes", "scale", "offset", "table", "sinks", "ring", "points", "fixed_scale", "fixed_offset")
    ]


class Call(ctypes.Structure):
    """`Call` of the sources: the kernel's only argument."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "part", "top", "sum", "counters")),
        ("k", Side),
        ("v", Side),
        ("state", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("k_width", "v_width", "sinks", "capacity", "rows")),
    ]


def _side(stored: Stored, exact: Exact) -> Side:
    constants = stored.constants
    arrays = *(stored.arrays.get(name) for name in ("codes", "scale", "offset")), stored.table, exact.sinks, exact.ring
    numbers = constants.points, constants.scale, constants.offset
    return Side(*(0 if x is None else x.data_ptr() for x in (*arrays, *numbers)))


def prepared(
    cell: Cell, q: Tensor, k: Stored, v: Stored, k_exact: Exact, v_exact: Exact, call: Decode, blocks: int
) -> tuple[Call, Tensor, tuple]:
    """The argument, the output, and what must live until the launch is made."""
    q, out = q.contiguous(), torch.empty(*q.shape, dtype=q.dtype, device=q.device)
    slots = 2 * blocks
    scratch = torch.empty(slots * (16 + cell.ROWS * cell.D), dtype=torch.float32, device=q.device)
    top, total, part = scratch.split_with_sizes([8 * slots, 8 * slots, slots * cell.ROWS * cell.D])
    sink = None if call.sink is None else call.sink.float().contiguous()
    pointers = (x.data_ptr() for x in (q, out, part, top, total, call.counters))
    numbers = call.scale, call.softcap or 0.0
    sizes = k.table.shape[1], v.table.shape[1], k_exact.sinks.shape[2], k_exact.ring.shape[2], q.shape[0]
    logits = 0 if sink is None else sink.data_ptr()
    argument = Call(*pointers, _side(k, k_exact), _side(v, v_exact), call.state.data_ptr(), logits, *numbers, *sizes)
    return argument, out, (q, scratch, sink)


@on_its_device
def decode(
    key: Traits, value: Traits, q: Tensor, k: Stored, v: Stored, k_exact: Exact, v_exact: Exact, call: Decode,
    tuning: Tuning | None = None,
) -> Tensor:  # fmt: skip
    """See `choose`: STEP, of a request that `serves` lets through. tuning: for measurements; None is the cell's own."""
    cell = cell_of(key, value, q, k_exact.ring.shape[1], call)
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    loaded = _loaded(cell, q.device.index or 0, tuning)
    argument, out, _alive = prepared(cell, q, k, v, k_exact, v_exact, call, loaded.grid)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    stream = torch.cuda.current_stream(q.device).cuda_stream
    grid, block = (loaded.grid, 1, 1), (32 * loaded.tuning.warps, 1, 1)
    _ok(driver.cuLaunchKernel(loaded.function, *grid, *block, loaded.shared, stream, ctypes.addressof(pointers), 0))
    return out
