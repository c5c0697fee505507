"""The CUDA decode kernel means what the parts mean that are computed one by one: its algebra, lane by lane, on a CPU.

Its sources are compiled twice: by NVRTC for GPUs, and by this machine's C++ compiler, with `warp.h` in place of PTX.
"""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from kvist.cache import step
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.cache.view import View
from kvist.kernels.choose import choose
from kvist.kernels.contract import Decode, Operation
from kvist.kernels.cuda import attend as attend_cuda
from kvist.methods import parse
from kvist.testing.stand_in import stand_in
from kvist.types import Geometry

pytest.importorskip("cuda.bindings")
COMPILER = shutil.which("g++") or shutil.which("clang++")
DIM, HEADS = 128, 2
RUN = """
extern "C" void run(const Call* call, int blocks, int bytes, int backward) {
  launch([](const Call& c) { decode(c); }, *call, blocks, WARPS * 32, bytes, backward);
}
"""
TUNING = attend_cuda.Tuning(span=32, stages=2, warps=2, blocks=1)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler: g++ or clang++")
    folder = tmp_path_factory.mktemp("host")
    (folder / "run.cpp").write_text(f'#include "{Path(__file__).with_name("warp.h")}"\n#include "decode.cu"\n{RUN}')

    @cache
    def built(cell, bulk):
        macros = cell._asdict() | attend_cuda.macros_of(TUNING._replace(copies=bulk)) | {"COUNTED": 0}
        name = folder / f"{abs(hash((cell, bulk)))}.so"
        options = [f"-D{k}={v}" for k, v in macros.items()]
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
        command = [COMPILER, *flags, *options, f"-I{attend_cuda.FOLDER}", str(folder / "run.cpp"), "-o", str(name)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(name))

    return built


def filled(text, updates, batch=2, dtype=torch.float32, size=1.0, dim=DIM):
    made, rows = stand_in(parse(text), HEADS, dim), Rows()
    layer = Layer(made.layers[0], made.page, "stored", 0, rows)
    for tokens in updates:
        rows.extend(batch, tokens, None)
        layer.update(*((size * torch.randn(batch, HEADS, tokens, dim)).to(dtype) for _ in range(2)))
    return layer


def attended(build, layer, q, blocks=5, bulk=1, backward=False, **options):
    """What the kernel says, and what the parts say."""
    view, scale = View.after(layer), q.shape[-1] ** -0.5
    expected = view.attend(q, scale, **options)
    key, value = layer.tracks
    call = Decode(step.state(layer, [0] * len(q)), step.counters(layer, q.shape[1], q.shape[2]), layer.page, scale)
    call = call._replace(**options)
    cell = attend_cuda.cell_of(key.codec.traits, value.codec.traits, q, HEADS, call)
    assert choose(Operation.STEP, replace(layer.request, device="cuda")).name == "cuda.attend.decode"
    sides = *step.stored(layer), step.exact(key), step.exact(value)
    argument, out, _alive = attend_cuda.prepared(cell, q, *sides, call, blocks)
    out.fill_(torch.nan)
    build(cell, bulk).run(ctypes.byref(argument), blocks, cell.shared(TUNING, blocks), int(backward))
    assert not call.counters.any()
    return out, expected


def agree(found, expected, rounding=4e-3):
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= rounding, f"{error:.2e}"


CELLS = [
    ("kivi:2", (700, 1, 1)),
    ("kivi:4 recent=32 sinks=3", (430, 1)),
    ("kivi k=4 v=2 group=64", (430, 1)),
    ("kivi k=2 v=4 group=128 recent=128", (600, 1)),
    ("kivi:2 recent=32 values=block", (300, 1)),
    ("kivi:3 group=64", (430, 1)),
    ("kivi k=1 v=8 recent=32", (300, 1)),
    ("kivi k=8 v=3 recent=32", (300, 1)),
    ("kivi k=2 v=1 recent=32", (300, 1)),
    ("int4", (300, 1)),
    ("int8", (200, 1)),
    ("hadamard:4", (300, 1)),
    ("hadamard:2", (300, 1, 1)),
    *((f"kvquant:{bits} keys=post-rope outliers=0", (300, 1)) for bits in (2, 3, 4)),
]
BULK, PLAIN, MIXED = 1, 0, 2  # how a warp copies; what it copies does not depend on it


@pytest.mark.parametrize(
    ("text", "updates", "copies"),
    [(*cell, BULK) for cell in CELLS]
    + [
        (*cell, copies)
        for cell in CELLS
        if cell[0] in ("kivi:2", "kivi:3 group=64", "int8")
        for copies in (PLAIN, MIXED)
    ],
)
def test_one_launch_is_the_merge_of_all_parts(text, updates, copies, build):
    torch.manual_seed(len(text))
    layer = filled(text, updates)
    agree(*attended(build, layer, torch.randn(2, 6, 1, DIM), bulk=copies))


@pytest.mark.parametrize("text", ["kivi:2", "kivi:4", "kivi:3", "int4", "hadamard:4"])
def test_heads_of_64_channels(text, build):
    torch.manual_seed(8)
    layer = filled(text, (300, 1), dim=64)
    agree(*attended(build, layer, torch.randn(2, 6, 1, 64)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, build):
    torch.manual_seed(1)
    layer = filled("kivi:2", (300, 1), dtype=dtype)
    q = torch.randn(2, 8, 1, DIM).to(dtype)
    agree(*attended(build, layer, q), 2**-7 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("size", [1e-4, 1e3])
@pytest.mark.parametrize("text", ["kivi:2 recent=32", "kivi:4 recent=32"])
def test_numbers_of_any_size(text, size, build):
    torch.manual_seed(2)
    layer = filled(text, (300, 1), size=size)
    agree(*attended(build, layer, torch.randn(2, 6, 1, DIM) / size))


def test_scales_that_grow_along_the_context(build):
    torch.manual_seed(3)
    made, rows = parse("kivi:2 recent=32"), Rows()
    layer = Layer(made.layers[0], made.page, "stored", 0, rows)
    for size in (1e-4, 1e-2, 1.0, 1e3):
        rows.extend(1, 160, None)
        layer.update(*(size * torch.randn(1, HEADS, 160, DIM) for _ in range(2)))
    agree(*attended(build, layer, torch.randn(1, 6, 1, DIM) * 1e-3, blocks=1))


def test_queries_of_speculative_decoding_see_no_later_token(build):
    torch.manual_seed(4)
    layer = filled("kivi:2 recent=32", (300, 4))
    agree(*attended(build, layer, torch.randn(2, 4, 4, DIM)))


def test_soft_caps_and_sink_logits(build):
    torch.manual_seed(5)
    layer = filled("kivi:4 recent=32", (300, 1))
    agree(*attended(build, layer, 4 * torch.randn(2, 6, 1, DIM), softcap=5.0, sink=torch.randn(6)))


@pytest.mark.parametrize("updates", [(1,), (20,), (97,)])
def test_short_contexts(updates, build):
    torch.manual_seed(6)
    layer = filled("kivi:2 recent=32 sinks=2", updates, batch=3)
    agree(*attended(build, layer, torch.randn(3, 6, 1, DIM)))


def test_any_order_of_blocks_gives_the_same(build):
    torch.manual_seed(7)
    layer = filled("kivi:2", (700, 1))
    q = torch.randn(2, 6, 1, DIM)
    forward, _ = attended(build, layer, q, blocks=7)
    assert torch.equal(forward, attended(build, layer, q, blocks=7, backward=True)[0])


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_it_compiles_for_gpus(arch):
    for cell in (
        attend_cuda.Cell(2, 2, 32, 32, 64, 8, 4, 1, 1),  # copied 16 bytes at a time
        attend_cuda.Cell(4, 2, 128, 64, 128, 8, 8, 2, 0, 1, 1),
    ):
        assert len(attend_cuda.compiled(cell, arch)) > 10_000
        ptx = attend_cuda.compiled(cell, arch, ptx=True)
        assert b"mma.sync" in ptx and (b"cp.async.bulk" in ptx) == (arch >= 90 and cell.tuning.copies > 0)


@pytest.mark.parametrize(
    ("block", "multiprocessor"), [(227 << 10, 228 << 10), (163 << 10, 164 << 10), (99 << 10, 100 << 10)]
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_cell_fits_into_shared_memory(block, multiprocessor, bits, group):
    """Of an H200, an A100 and a 4090; on the first with 16 warps per multiprocessor, where a span is not too large."""
    cell = attend_cuda.Cell(bits, bits, group, group, max(64, group), 8, 8, 1, 1)
    found = attend_cuda.fitted(cell, cell.tuning, block, multiprocessor)
    taken = cell.shared(found, 2 * 160) + attend_cuda.STATIC
    assert taken <= block and found.blocks * taken <= multiprocessor
    if block > 200 << 10:
        assert found.warps * found.blocks == 16


def asked(text, **said):
    """Who serves a decode step of a layer on a GPU, heads of 128, and why the CUDA kernel does not."""
    plan = parse(text).layers[0]
    request = plan.request(Geometry(8, DIM, DIM, torch.float16), plan.page, torch.device("cuda"))
    choice = choose(Operation.STEP, replace(request, **{"group": 4, "dtype": torch.float16} | said))
    return choice.name, "; ".join(dict(choice.refused).get("cuda", ()))


@pytest.mark.parametrize(
    "text, said, reason",
    [
        ("kvquant:4", {}, "keep outliers"),
        ("int4 group=32", {}, "nor along all channels of a token"),
        ("hadamard:4 group=32", {}, "along less than a head"),
        ("logquant:2", {}, "pins"),
        ("kivi:2", {"gaps": True}, "deep crop"),
        ("kivi:2", {"dims": (80, 80)}, "heads of 80 channels"),
        ("kivi:1", {"dims": (64, 64)}, "128 stored bits"),
        ("kivi:2", {"group": 16}, "more than 8 query rows"),
        ("kivi:2", {"batch": 1 << 14}, "65535 rows"),
        ("kivi:2", {"dtype": torch.float64}, "float64"),
        ("kivi:2", {"dtype": torch.float32}, "exact tokens torch.float16"),
        ("kivi:2", {"page": 72}, "whole groups"),
        ("kivi:2", {"capability": (7, 5)}, "older than sm_80"),
        ("kivi:2", {"queries": 2, "padded": True}, "padding"),
        ("kivi:2", {"hidden": True}, "a mask of the model's own"),
    ],
)
def test_what_it_does_not_serve_is_named(text, said, reason):
    name, reasons = asked(text, **said)
    assert reason in reasons and name != "cuda.attend.decode"


def test_it_is_chosen_for_what_it_serves():
    for text in ("kivi:2", "kivi k=4 v=2", "kivi:4 group=128", "kivi:3", "kivi:8", "kivi:1", "int4", "hadamard:4"):
        assert asked(text) == ("cuda.attend.decode", "")
    assert asked("kivi:2", dims=(64, 64))[0] == "cuda.attend.decode"
    assert asked("kvquant:4")[0] == asked("kivi:2", dims=(80, 80))[0] == "triton.decode.decode"
