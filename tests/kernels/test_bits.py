"""Packing small integers: an equality at every width and every odd multiple of eight codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.kernels.contract import PLANES, RUN, packed_bytes
from kvist.kernels.reference.bits import pack, unpack

WIDTHS = sorted(PLANES)


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=40, deadline=None)
@given(runs=st.integers(1, 33), lead=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 2**32 - 1))
def test_round_trip_is_equality(bits, runs, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, runs * RUN), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, runs * RUN * bits // 8) == (*lead, packed_bytes(runs * RUN, bits))
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_string_is_the_packing_of_some_codes(bits):
    generator = torch.Generator().manual_seed(bits)
    packed = torch.randint(0, 256, (5, 3 * bits), dtype=torch.uint8, generator=generator)
    codes = unpack(packed, bits)
    assert int(codes.max()) < 2**bits
    assert torch.equal(pack(codes, bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_code_touches_its_own_bits_only(bits):
    zeros = torch.zeros(24, dtype=torch.uint8)
    footprints = []
    for i in range(24):
        codes = zeros.clone()
        codes[i] = 2**bits - 1
        footprints.append(pack(codes, bits).int())
    total = sum(footprints)
    assert torch.equal(total, torch.full_like(total, 255)), "footprints are disjoint and cover every bit"


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codes = torch.randint(0, 8, (4, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(codes, 3), torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1))
    assert PLANES[3] == (2, 1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_order_is_planar(bits):
    """Byte w holds, from its low bits up, the codes w, w+W, w+2W, …"""
    codes = torch.randint(0, 2**bits, (32,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    width = 32 * bits // 8
    expected = [sum(int(codes[w + i * width]) << (i * bits) for i in range(8 // bits)) for w in range(width)]
    assert pack(codes, bits).tolist() == expected


def test_codes_above_the_width_cannot_spill_into_neighbours():
    codes = torch.zeros(8, dtype=torch.uint8)
    codes[3] = 255
    for bits in (1, 2, 3, 4):
        unpacked = unpack(pack(codes, bits), bits)
        assert int(unpacked[3]) == 2**bits - 1
        assert int(unpacked.sum()) == 2**bits - 1


@pytest.mark.parametrize("length", [1, 7, 12, 20])
def test_a_broken_run_is_refused(length):
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(torch.zeros(length, dtype=torch.uint8), 2)
