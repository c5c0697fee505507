"""Coding in Triton gives the reference to the bit. On a CPU Triton's interpreter runs the kernels."""

import os
from unittest import mock

import pytest
import torch
from drawn import codec_of, coded, table_of, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cache.pages import Pool
from kvist.coding import AbsMax, Codec, Grouping, Hadamard, Slots, Uniform
from kvist.kernels.reference.grid import rotate as reference_rotate
from kvist.methods.parts import per_channel, per_token

pytest.importorskip("triton")
with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
    from kvist.kernels.triton.codec import decode, encode, encode_pages, rotate

CPU = torch.device("cpu")


def _same(codec, x):
    constants, expected = codec.constants(x.shape[-3], CPU), codec._reference(x.float())
    found = encode(codec.traits, x, constants, codec._slots(x))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name
    stored = {name: array for name, array in found.items() if name != "clipped"}
    assert torch.equal(decode(codec.traits, stored, constants), codec._decoded(stored))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    group=st.sampled_from([32, 40, 64, 128, None]),
    keys=st.booleans(),
    dim=st.integers(1, 34).map(lambda n: 8 * n),
    blocks=st.integers(1, 3),
    exponent=st.integers(-12, 6),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_uniform_levels_give_the_reference_to_the_bit(bits, group, keys, dim, blocks, exponent, dtype, seed):
    codec = per_channel(bits, group or 32) if keys else per_token(bits, group)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, blocks * max(codec.granule, 8), dim, generator=generator) * 10.0**exponent
    x[0, 0, :, 0] = 1.5  # a constant channel
    x[1, 1] = 0.0  # a constant head
    _same(codec, x.clamp(-60000, 60000).to(dtype))


@settings(max_examples=40, deadline=None)
@given(coded())
def test_every_kind_of_levels_and_ranges_gives_the_reference_to_the_bit(drawn):
    _same(*drawn)


@pytest.mark.parametrize("dim", [8, 40, 64, 96, 128, 256])
def test_rotation_gives_the_reference_to_the_bit(dim):
    x, block = 5 * torch.randn(2, 3, 7, dim, generator=torch.Generator().manual_seed(dim)), dim & -dim
    assert torch.equal(rotate(x, block), reference_rotate(x, block))
    assert torch.equal(rotate(x.transpose(0, 2), block), reference_rotate(x.transpose(0, 2), block))


@pytest.mark.parametrize("dim", [40, 64, 96, 128])
@pytest.mark.parametrize("slots", [0, 4])
def test_values_may_be_rotated_on_the_way(dim, slots):
    codec = per_token(3, 32).model_copy(update={"transform": Hadamard()})
    codec = codec.model_copy(update={"outliers": Slots(slots=slots)}) if slots else codec
    x = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(dim)).half()
    expected = codec._reference(codec.transform.forward(x.float()))
    found = encode(codec.traits, x, codec.constants(3, CPU), slots, turn=True)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["channels", "tokens"])
@pytest.mark.parametrize("table", [False, True])
def test_symmetric_ranges(kind, table):
    levels = table_of(3, torch.Generator().manual_seed(0)) if table else Uniform(bits=3)
    codec = Codec(levels=levels, grouping=Grouping(along=kind, size=16), range=AbsMax())
    _same(codec, torch.randn(2, 3, 32, 80, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("along", ["tokens", "channels"])
def test_values_may_lie_in_any_order_and_be_none(along):
    x = torch.randn(64, 2, 3, 64, generator=torch.Generator().manual_seed(0))
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along=along, size=32))
    _same(codec, x.permute(1, 2, 0, 3))
    _same(codec, x.permute(1, 2, 0, 3)[:, :, :0])
    _same(codec, torch.randn(64, 2, 3, 64).permute(1, 2, 3, 0))


@pytest.mark.parametrize("slots", [2, 254])
def test_wide_heads_number_their_channels_in_two_bytes(slots):
    for codec, x in wide(slots):
        _same(codec, x)


def test_a_damaged_outlier_is_not_written_beyond_its_head():
    codec = codec_of("token", Uniform(bits=4), 16, 4, torch.Generator())
    arrays = encode(codec.traits, torch.randn(1, 2, 3, 8), codec.constants(2, CPU), 4)
    whole = decode(codec.traits, arrays, codec.constants(2, CPU))
    arrays["channel"][0, 1], arrays["ends"][0, 2] = 200, 255
    x = decode(codec.traits, arrays, codec.constants(2, CPU))
    assert torch.equal(x[:, :, 0], whole[:, :, 0]) and torch.isfinite(x).all()


def test_groups_must_be_full():
    with pytest.raises(ValueError, match="whole groups of 32"):
        encode(per_channel(2, 32).traits, torch.zeros(1, 1, 33, 64), per_channel(2, 32).constants(1, CPU), 0)


@pytest.mark.parametrize("kind", ["fixed", "token", "head", "tokens", 32])
@pytest.mark.parametrize("dim", [64, 80])
def test_pages_hold_what_the_reference_puts_there(kind, dim):
    generator = torch.Generator().manual_seed(dim)
    codec, page, starts, tokens = codec_of(kind, table_of(3, generator), 2 * dim, 0, generator), 64, [0, 40], 88
    pools = [Pool(codec.layout(2, dim, torch.float32), 2, page, CPU, 2) for _ in range(2)]
    for pool in pools:
        pool.resize(6)
        pool.free = [3, 1, 4, 0, 5, 2]
        for row, start in enumerate(starts):
            pool.extend(row, 0, start + tokens)
        for array in pool.arrays.values():
            array.zero_()
    x = torch.randn(2, 2, tokens, dim, generator=generator).half()
    expected = codec._reference(x.float())
    clipped = torch.zeros((), dtype=torch.int64)
    encode_pages(
        codec.traits, x, pools[0].arrays, pools[0].table(4), torch.tensor(starts, dtype=torch.int32),
        codec.constants(2, CPU), page, clipped=clipped,
    )  # fmt: skip
    assert clipped == expected.pop("clipped", 0)
    pools[1].write([0, 1], starts, expected)
    assert all(torch.equal(array, pools[1].arrays[name]) for name, array in pools[0].arrays.items())


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_one_correction_makes_a_quotient_by_an_fp16_number_exact(off):
    """What `quotient` does on a GPU, its fused multiply-adds in fp64: over every scale there is, around the middles
    between levels and elsewhere, from a reciprocal that is `off` by some units in the last place."""
    scale = torch.arange(1, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    inverse = (1 / scale).view(torch.int32).add(off).view(torch.float32)
    generator = torch.Generator().manual_seed(off)
    middles = torch.tensor([0, 1, 2, 3, 6, 7, 14, 30, 100, 254]) + 0.5
    near = (scale * middles).view(torch.int32).unsqueeze(-1) + torch.arange(-3, 4, dtype=torch.int32)
    far = scale * (torch.rand(len(scale), 40, generator=generator) * 1024)
    a = torch.cat([near.view(torch.float32).flatten(1), far, -far, far.half().float().clamp(max=60000)], dim=-1)
    q = a * inverse
    rest = (a.double() - q.double() * scale.double()).float()
    assert torch.equal((q.double() + rest.double() * inverse.double()).float(), a / scale)
