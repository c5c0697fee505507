"""Triton's decode step means what the parts mean that are computed one by one and merged."""

import subprocess
import sys

import pytest
import torch

from kvist.cache import step
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.cache.view import View
from kvist.kernels.contract import Decode
from kvist.kernels.triton import decode as decode_triton
from kvist.kernels.triton import unpack as unpack_triton
from kvist.kernels.triton.ahead import compiled
from kvist.methods import parse
from kvist.methods.parts import per_channel
from kvist.testing.cases import CASES, recipe
from kvist.testing.stand_in import stand_in

pytestmark = pytest.mark.usefixtures("device")
ROUNDING = 4e-3  # of the largest output: operands are rounded to fp16, to 2^-11 each


def filled(text, heads=2, dim=32, updates=(230, 1, 1, 70, 1), batch=2, dtype=torch.float32, size=1.0, padding=0):
    """A layer with random keys and values; row 0 begins with `padding` slots of padding."""
    made = recipe(text, dim, prefill="stored") if heads == 2 else stand_in(parse(text), heads, dim)
    rows = Rows()
    layer = Layer(made.layers[0], made.page, "stored", 0, rows)
    for i, tokens in enumerate(updates):
        real = torch.ones(batch, tokens, dtype=torch.bool)
        real[0, : padding if i == 0 else 0] = False
        rows.extend(batch, tokens, real)
        layer.update(*((size * torch.randn(batch, heads, tokens, dim)).to(dtype) for _ in range(2)))
    return layer


def both(layer, q, monkeypatch, scale=None, **options):
    """What the kernel says, and what the parts say."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = View.after(layer)._attend(q, scale, None, True, options.get("softcap"), options.get("sink"))
    expected = parts.to(q.dtype)
    with monkeypatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        found = View.after(layer)._step(q, scale, options.get("softcap"), options.get("sink"))
    assert found is not None
    assert not layer.counters.any()
    return found, expected


def agree(found, expected, rounding=ROUNDING):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= rounding, f"{error:.2e}"


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_halves_are_the_codes_of_every_half_there_is(bits):
    lanes = torch.arange(65536).sub(32768).to(torch.int16)
    out = torch.empty(16 // bits, 65536, dtype=torch.float16)
    unpack_triton._compare[(64,)](lanes, out, BITS=bits, WIRED=False)
    fields = 8 // bits
    for i, number in enumerate(out):
        byte = (lanes.int() >> (8 * (i // fields))) & 0xFF
        code = (byte >> (bits * (i % fields))) & ((1 << bits) - 1)
        assert torch.equal(number.double(), code.double() * 2.0 ** (bits * (i % fields) - 24))


@pytest.mark.parametrize("text", [text for text in CASES if text != "exact"])
def test_one_launch_is_the_merge_of_all_parts(text, monkeypatch):
    torch.manual_seed(len(text))
    layer = filled(text, padding=37)
    agree(*both(layer, torch.randn(2, 6, 1, 32), monkeypatch))


SPECULATED = ["kivi:2 recent=32", "kivi k=4 v=8 recent=32", "hadamard:4", "kvquant:2", "logquant:2 window=32"]


@pytest.mark.parametrize("queries", [4, 8])
@pytest.mark.parametrize("text", SPECULATED)
def test_queries_of_speculative_decoding_see_no_later_token(text, queries, monkeypatch):
    torch.manual_seed(3)
    layer = filled(text, dim=128 if "kivi" in text else 32, updates=(150, queries), batch=1)
    dim = layer.shape.key_dim
    agree(*both(layer, torch.randn(1, 4, queries, dim), monkeypatch))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("text", ["kivi:2", "kivi k=3 v=4", "hadamard:4"])
def test_head_sizes(text, dim, monkeypatch):
    torch.manual_seed(dim)
    layer, q = filled(text, heads=1, dim=dim, updates=(190,), batch=1), torch.randn(1, 2, 1, dim)
    if text == "hadamard:4" and dim > 128:  # its matrix does not fit beside the rest: the parts serve
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert View.after(layer)._step(q, 1.0, None, None) is None
    else:
        agree(*both(layer, q, monkeypatch))


def test_rotary_embeddings_that_scale(monkeypatch):
    torch.manual_seed(11)
    made = recipe("kvquant:3", 32, prefill="stored")
    plan = made.layers[0]
    turn = plan.key.codec.transform.model_copy(update={"scaling": 1.4})
    key = plan.key.model_copy(update={"codec": plan.key.codec.model_copy(update={"transform": turn})})
    layer = Layer(plan.model_copy(update={"key": key}), made.page, "stored", 0, Rows())
    layer.rows.extend(1, 190, None)
    layer.update(*(torch.randn(1, 2, 190, 32) for _ in range(2)))
    agree(*both(layer, torch.randn(1, 4, 1, 32), monkeypatch))


def test_groups_shorter_than_a_tile(monkeypatch):
    torch.manual_seed(12)
    plan = parse("kivi:2 recent=32").layers[0]
    key = plan.key.model_copy(update={"codec": per_channel(2, 16)})
    layer = Layer(plan.model_copy(update={"key": key}), 64, "stored", 0, Rows())
    layer.rows.extend(1, 190, None)
    layer.update(*(torch.randn(1, 1, 190, 128) for _ in range(2)))
    agree(*both(layer, torch.randn(1, 2, 1, 128), monkeypatch))


@pytest.mark.parametrize("group", [1, 4, 7, 16])
@pytest.mark.parametrize("text", ["kivi:2 group=64 recent=64", "kvquant:3 outliers=0"])
def test_grouped_queries(text, group, monkeypatch):
    torch.manual_seed(group)
    layer = filled(text, updates=(200,), dim=64)
    agree(*both(layer, torch.randn(2, 2 * group, 3 if group == 16 else 1, 64), monkeypatch))


@pytest.mark.parametrize("size", [1e-4, 1e3])
@pytest.mark.parametrize("text", ["kivi:2", "int4", "kvquant:4"])
def test_numbers_of_any_size(text, size, monkeypatch):
    torch.manual_seed(5)
    layer = filled(text, dim=64, updates=(200,), size=size)
    agree(*both(layer, torch.randn(2, 2, 1, 64) / size, monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, monkeypatch):
    torch.manual_seed(6)
    layer = filled("kivi:2", dim=64, updates=(200,), dtype=dtype)
    found, expected = both(layer, torch.randn(2, 6, 1, 64).to(dtype), monkeypatch)
    agree(found, expected, 2**-7 if dtype == torch.bfloat16 else ROUNDING)


def test_soft_caps_and_sink_logits(monkeypatch):
    torch.manual_seed(7)
    layer = filled("kivi:4 recent=32", dim=64)
    q = 4 * torch.randn(2, 6, 1, 64)
    agree(*both(layer, q, monkeypatch, softcap=5.0))
    agree(*both(layer, q, monkeypatch, sink=torch.randn(6)))


@pytest.mark.parametrize("updates", [(1,), (20,), (40,), (97,)])
def test_short_contexts(updates, monkeypatch):
    torch.manual_seed(8)
    layer = filled("kivi:2 recent=32 sinks=2", updates=updates, batch=1)
    agree(*both(layer, torch.randn(1, 2, 1, 32), monkeypatch))


def launch(layer, q, **options):
    key, value = layer.tracks
    call = Decode(step.state(layer, [0] * layer.batch_size), step.counters(layer, q.shape[1], 1), layer.page, 0.1)
    sides = *step.stored(layer), step.exact(key), step.exact(value)
    return decode_triton.decode(key.codec.traits, value.codec.traits, q, *sides, call, **options)


def test_however_the_work_is_cut():
    torch.manual_seed(9)
    layer = filled("kivi:2", dim=64, updates=(400,), batch=3)
    q = torch.randn(3, 4, 1, 64)
    one = launch(layer, q, splits=1)
    assert torch.equal(one, launch(layer, q, splits=1))
    for splits in (2, 5, 16):
        agree(launch(layer, q, splits=splits), one, 1e-3)
    for configuration in decode_triton.configurations():
        agree(launch(layer, q, splits=1, configuration=configuration), one, 1e-3)


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(10)
    layer = filled("kivi:2", dim=64, updates=(200,), batch=3)
    q = torch.randn(3, 4, 1, 64)
    together = launch(layer, q)
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(launch(layer, q[1:2]), together[1:2])


def test_what_the_kernel_cannot_serve_is_left_to_the_parts(monkeypatch):
    layer = filled("kivi:2 recent=32", updates=(150, 4), batch=1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert View.after(layer)._step(torch.randn(1, 2, 9, 32), 1.0, None, None) is None
    layer.crop(-60)  # closes a group: slots are no positions any more
    layer.rows.crop(layer.slots)
    assert View.after(layer)._step(torch.randn(1, 2, 1, 32), 1.0, None, None) is None


def test_nothing_is_compiled_ahead_where_nothing_is_compiled():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compiled(90, decode_triton.decode_kernel, decode_triton.decode)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_it_compiles_for_gpus(arch):
    program = f"""
from benchmarks.instructions import on_paper
from kvist.kernels.triton.ahead import compiled
from kvist.kernels.triton.attend import decode_kernel
from kvist.kernels.triton.decode import decode
from kvist.methods import parse
from kvist.methods.parts import per_channel, per_token
from kvist.testing.stand_in import stand_in
calibrated = stand_in(parse("kvquant:3"), 8, 128).layers[0]
for folded, call in (
    (True, on_paper(per_channel(2, 32), per_token(4, 32))),
    (False, on_paper(calibrated.key.codec, calibrated.value.codec)),
):
    (kernel,) = compiled({arch}, decode_kernel, decode, *call)
    assert "mma.sync" in kernel.asm["ptx"] and len(kernel.asm["cubin"]) > 1000
    assert not folded or "0x00030003" in kernel.asm["ptx"] or "196611" in kernel.asm["ptx"]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
