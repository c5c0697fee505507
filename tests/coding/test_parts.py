"""The parts of a codec by themselves: levels, groupings, outliers, transforms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kvist.coding import Codec, Grouping, Hadamard, Identity, Raw, Slots, Table, Uniform
from kvist.kernels.reference.grid import rotate


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([1, 2, 3, 4]), seed=st.integers(0, 10**6))
def test_table_gives_the_nearest_point(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(2**bits, generator=generator) * 2 - 1).sort().values
    u = torch.rand(400, generator=generator) * 3 - 1.5
    table = Table(bits=bits, points=tuple(points.tolist()))
    chosen = table.point(table.index(u))
    best = (u[:, None] - points).abs().min(-1).values
    torch.testing.assert_close((u - chosen).abs(), best, rtol=0, atol=1e-6)


def test_uniform_gives_the_nearest_point_halves_to_even():
    u = torch.tensor([-5.0, -0.4, 0.5, 1.5, 2.5, 2.6, 9.0])
    assert Uniform(bits=2).index(u).tolist() == [0, 0, 0, 2, 2, 3, 3]


def test_a_reading_table_moves_points_and_keeps_decisions():
    points, read = (-1.0, -0.25, 0.25, 1.0), (-0.9, -0.3, 0.3, 0.8)
    plain, moved = Table(bits=2, points=points), Table(bits=2, points=points, read=read)
    u = torch.linspace(-1.2, 1.2, 201)
    assert torch.equal(plain.index(u), moved.index(u))
    assert set(moved.point(moved.index(u)).tolist()) == set(torch.tensor(read).tolist())


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 2, "points": (0.0, 1.0)},
        {"bits": 1, "points": (1.0, -1.0)},
        {"bits": 1, "points": (-1, 1), "read": (0,)},
    ],
)
def test_impossible_tables_are_refused(arguments):
    with pytest.raises(ValidationError):
        Table(**arguments)


@pytest.mark.parametrize("size", [1, 2, 8, 32, 64, 128])
def test_hadamard_matrix_is_symmetric_and_its_own_inverse(size):
    matrix = rotate(torch.eye(size), size)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


@pytest.mark.parametrize("transform", [Identity(), Hadamard()], ids=str)
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128])
def test_transforms_invert_and_preserve_inner_products(transform, dim):
    generator = torch.Generator().manual_seed(dim)
    q, k = torch.randn(2, 3, 5, dim, generator=generator).unbind(0)
    torch.testing.assert_close(transform.inverse(transform.forward(k)), k, rtol=0, atol=1e-5)
    there = (transform.forward(q) * transform.forward(k)).sum(-1)
    torch.testing.assert_close(there, (q * k).sum(-1), rtol=0, atol=1e-4)


def test_hadamard_spreads_one_outlier_over_its_block():
    x = torch.zeros(1, 96)
    x[0, 40] = 16.0
    spread = Hadamard().forward(x)[0]  # 96 = 3 blocks of 32
    assert torch.equal(spread[:32], torch.zeros(32)) and torch.equal(spread[64:], torch.zeros(32))
    torch.testing.assert_close(spread[32:64].abs(), torch.full((32,), 16 / 32**0.5))


@pytest.mark.parametrize("dim", [40, 64, 72])
@pytest.mark.parametrize("size", [8, 32, None])
def test_groups_along_channels_partition_and_spread(dim, size):
    grouping = Grouping(along="channels", size=size)
    x = torch.arange(2 * 3 * dim).float().view(2, 3, dim)
    groups = grouping.split(x)
    assert groups.shape[:3] == (2, 3, grouping.count(dim))
    assert set(groups.flatten().tolist()) == set(x.flatten().tolist())
    width = size or dim
    first = torch.arange(dim) // width * width
    spread = grouping.spread(groups[..., 0], dim).expand(2, 3, dim)
    assert torch.equal(spread, x[..., first]), "each number meets the first member of its own group"


def test_groups_along_tokens_hold_one_channel():
    grouping = Grouping(along="tokens", size=8)
    x = torch.arange(2 * 16 * 5).float().view(2, 16, 5)
    assert torch.equal(grouping.split(x)[1, 1, 3], x[1, 8:16, 3])
    assert grouping.granule == 8 and Grouping(along="channels", size=8).granule == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"along": "tokens"},
        {"along": "tokens", "size": 32, "across_heads": True},
        {"along": "channels", "size": 32, "across_heads": True},
        {"along": "channels", "size": 12},
        {"along": "channels", "size": 0},
        {"along": "heads", "size": 8},
    ],
)
def test_impossible_groupings_are_refused(arguments):
    with pytest.raises(ValidationError):
        Grouping(**arguments)


@settings(max_examples=40, deadline=None)
@given(half=st.integers(1, 4), seed=st.integers(0, 10**6), width=st.integers(8, 40))
def test_slots_take_the_lowest_and_the_highest(half, seed, width):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    found = Slots(slots=2 * half).find(x)
    ranked = x.sort(-1).values
    wanted = torch.cat([ranked[:, :half], ranked[:, -half:]], -1).sort(-1).values
    assert torch.equal(x.gather(-1, found).sort(-1).values, wanted)
    assert (found[:, 1:] > found[:, :-1]).all()


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_slots_come_in_pairs(slots):
    with pytest.raises(ValidationError):
        Slots(slots=slots)


def test_exact_values_have_no_outliers():
    with pytest.raises(ValidationError, match="no outliers"):
        Codec(levels=Raw(), grouping=Grouping(along="channels"), outliers=Slots(slots=2))


def test_a_codec_survives_json():
    codec = Codec(
        levels=Table(bits=1, points=(-0.5, 0.5), read=(-0.4, 0.4)),
        grouping=Grouping(along="channels", across_heads=True),
        outliers=Slots(slots=4),
        transform=Hadamard(),
    )
    adapter = TypeAdapter(Codec)
    assert adapter.validate_json(adapter.dump_json(codec)) == codec
