"""The codec: its error bound, its image, exact outliers, short groups, and numbers at the edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.coding import AbsMax, Codec, Fixed, Grouping, Hadamard, MinMax, Raw, Slots, Table, Uniform

UNIT = 2.0**-11  # relative rounding of fp16, in which scale and offset are stored
TINY = 2.0**-25  # absolute rounding of fp16 below its normal numbers


def gaussian(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def groups_of(x: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """For each number of x (H, T, D), its group's number: written from the definition, with plain loops."""
    heads, tokens, dim = x.shape
    ids = torch.empty(heads, tokens, dim, dtype=torch.long)
    size = grouping.size or dim
    for h in range(heads):
        for t in range(tokens):
            for d in range(dim):
                if grouping.along == "tokens":
                    name = (h, t // size, d)
                elif grouping.across_heads:
                    name = (0, t, 0)
                else:
                    name = (h, t, d // size)
                ids[h, t, d] = (name[0] * (tokens + 1) + name[1]) * (dim + 1) + name[2]
    return ids


def bound(x: torch.Tensor, grouping: Grouping, bits: int, symmetric: bool = False) -> torch.Tensor:
    """Half a step per group, or what the rounding of scale and offset to fp16 pushes beyond an end of the ladder."""
    ids, top, x = groups_of(x, grouping), 2**bits - 1, x.double()
    out = torch.empty_like(x)
    for name in ids.unique():
        members = x[ids == name]
        low, high = members.min(), members.max()
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        step = (high - low) / top
        drift = UNIT * (low.abs() + top * step) + TINY * (1 + top)
        half = step / 2 * (1 + UNIT) + TINY
        out[ids == name] = torch.maximum(half, drift) + 8 * torch.finfo(torch.float32).eps * members.abs().max()
    return out


GROUPINGS = [
    Grouping(along="tokens", size=8),
    Grouping(along="tokens", size=32),
    Grouping(along="channels", size=32),
    Grouping(along="channels"),
    Grouping(along="channels", across_heads=True),
]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("range_", [MinMax(), AbsMax()], ids=["minmax", "absmax"])
def test_error_is_at_most_half_a_step_of_the_group(bits, grouping, range_):
    x = gaussian(bits, 2, 32, 40) * torch.linspace(0.01, 5, 40) + 0.7
    codec = Codec(levels=Uniform(bits=bits), grouping=grouping, range=range_)
    error = (codec.decode(codec.encode(x)) - x).abs()
    assert (error <= bound(x, grouping, bits, range_.kind == "absmax")).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    power=st.integers(-30, 14),
    shift=st.integers(-9, 9),
)
def test_error_bound_holds_at_any_magnitude(seed, bits, power, shift):
    x = (gaussian(seed, 1, 8, 16) + shift) * 2.0**power
    grouping = Grouping(along="tokens", size=8)
    codec = Codec(levels=Uniform(bits=bits), grouping=grouping)
    if float(x.abs().max()) * 2 < 65504:
        assert ((codec.decode(codec.encode(x)) - x).abs() <= bound(x, grouping, bits)).all()


@pytest.mark.parametrize("dim", [8, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("size", [32, 64, None])
def test_head_sizes_that_are_no_multiple_of_the_group_have_a_shorter_last_group(dim, size):
    grouping = Grouping(along="channels", size=size)
    codec = Codec(levels=Uniform(bits=2), grouping=grouping)
    x = gaussian(dim, 2, 3, dim)
    arrays = codec.encode(x)
    assert arrays["scale"].shape[-1] == (-(-dim // size) if size else 1)
    assert ((codec.decode(arrays) - x).abs() <= bound(x, grouping, 2)).all()
    if size and dim % size:  # the short group's range is that of its own members, as if it stood alone
        alone = codec.encode(x[..., dim // size * size :])
        assert torch.equal(arrays["scale"][..., -1:], alone["scale"])
        assert torch.equal(arrays["offset"][..., -1:], alone["offset"])


@pytest.mark.parametrize("codec", [
    Codec(levels=Uniform(bits=3), grouping=Grouping(along="tokens", size=32)),
    Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels", size=32), range=AbsMax()),
    Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels", across_heads=True), outliers=Slots(slots=4)),
    Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels"), transform=Hadamard()),
    Codec(levels=Raw(), grouping=Grouping(along="channels")),
], ids=str)  # fmt: skip
def test_arrays_are_shaped_as_the_layout_says(codec):
    heads, tokens, dim = 2, 64, 40
    x = gaussian(0, 3, heads, tokens, dim, dtype=torch.bfloat16)
    arrays, layout = codec.encode(x), codec.layout(heads, dim, torch.bfloat16)
    assert arrays.keys() == layout.keys()
    for name, spec in layout.items():
        lead = (3, heads) if spec.kind == "head" else (3,)
        assert arrays[name].shape == (*lead, tokens // spec.stride, *spec.shape), name
        assert arrays[name].dtype == spec.dtype, name


def test_tokens_or_groups_are_encoded_independently_of_their_company():
    x = gaussian(1, 2, 64, 40)
    for codec, cut in (
        (Codec(levels=Uniform(bits=2), grouping=Grouping(along="tokens", size=32)), 32),
        (Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels", size=32)), 19),
    ):
        whole = codec.decode(codec.encode(x))
        parts = [codec.decode(codec.encode(x[:, a:b])) for a, b in ((0, cut), (cut, 64))]
        assert torch.equal(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["uniform", "table"])
def test_the_image_is_the_set_of_points(bits, kind):
    points = torch.linspace(-1, 1, 2**bits).pow(3)
    levels = Uniform(bits=bits) if kind == "uniform" else Table(bits=bits, points=tuple(points.tolist()))
    codec = Codec(levels=levels, grouping=Grouping(along="channels"))
    x = torch.linspace(-3, 5, 512).view(1, 1, -1)
    decoded = codec.decode(codec.encode(x)).unique()
    units = torch.arange(2**bits) / (2**bits - 1) if kind == "uniform" else (points + 1) / 2
    torch.testing.assert_close(decoded, -3 + 8 * units, rtol=0, atol=8 * 8 * UNIT)
    assert len(decoded) == 2**bits


def test_decoded_points_are_fixed_points():
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="tokens", size=8))
    once = codec.decode(codec.encode(gaussian(2, 1, 8, 16)))
    ids = codec.encode(once)
    torch.testing.assert_close(codec.decode(ids), once, rtol=4 * UNIT, atol=4 * UNIT)
    assert torch.equal(codec.encode(codec.decode(ids))["codes"], ids["codes"])


def test_absmax_is_symmetric():
    codec = Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels", size=32), range=AbsMax())
    x = gaussian(3, 2, 5, 64)
    assert set(codec.encode(x)) == {"codes", "scale"}
    torch.testing.assert_close(codec.decode(codec.encode(-x)), -codec.decode(codec.encode(x)), rtol=0, atol=1e-5)


def test_fixed_ranges_store_nothing_and_saturate():
    low, high = tuple(float(-1 - i) for i in range(16)), tuple(float(2 + i) for i in range(16))
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels"), range=Fixed(low=low, high=high))
    lows, highs = (torch.tensor(side).view(2, 1, 8) for side in (low, high))
    inside = lows + (highs - lows) * torch.rand(2, 9, 8, generator=torch.Generator().manual_seed(4))
    arrays = codec.encode(inside)
    assert set(arrays) == {"codes", "clipped"} and set(codec.layout(2, 8, torch.bfloat16)) == {"codes"}
    assert arrays["clipped"] == 0
    error = (codec.decode(codec.encode(inside)) - inside).abs()
    assert (error <= (highs - lows) / 6 * (1 + UNIT) + 4 * UNIT * (highs - lows)).all()
    for x, end in ((highs + 100, highs), (lows - 100, lows)):
        torch.testing.assert_close(codec.decode(codec.encode(x)), end, rtol=4 * UNIT, atol=4 * UNIT)


@pytest.mark.parametrize("grouping", GROUPINGS[:1] + GROUPINGS[2:], ids=str)
def test_outliers_are_exact_and_leave_the_ranges_alone(grouping):
    calm = gaussian(5, 2, 8, 64).clamp(-2, 2)
    x, slots, generator = calm.clone(), 4, torch.Generator().manual_seed(6)
    where = torch.zeros(2, 8, 64, dtype=torch.bool)
    for token in range(8):
        for i, flat in enumerate(torch.randperm(128, generator=generator)[:slots].tolist()):
            where[flat // 64, token, flat % 64] = True
            x[flat // 64, token, flat % 64] = (50 + token) * (-1) ** i
    codec = Codec(levels=Uniform(bits=4), grouping=grouping, outliers=Slots(slots=slots))
    arrays = codec.encode(x)
    decoded = codec.decode(arrays)
    assert torch.equal(decoded[where], x[where].half().float())
    # Ranges: what a codec without outliers measures once the escaped entries repeat another member of their group.
    ids = groups_of(x, grouping)
    filled = x.clone()
    for h, t, d in where.nonzero().tolist():
        filled[h, t, d] = x[(ids == ids[h, t, d]) & ~where][0]
    plain = Codec(levels=Uniform(bits=4), grouping=grouping).encode(filled)
    assert torch.equal(arrays["scale"], plain["scale"]) and torch.equal(arrays["offset"], plain["offset"])
    inliers = (decoded - x).abs()[~where]
    assert (inliers <= bound(filled, grouping, 4)[~where]).all()


def test_outlier_channels_are_distinct_and_ascending_even_among_equal_values():
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels"), outliers=Slots(slots=6))
    x = torch.ones(2, 3, 8)
    channel = codec.encode(x)["channel"]
    assert (channel[:, 1:] > channel[:, :-1]).all()
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_a_group_of_outliers_only_decodes_them_all():
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels", size=8), outliers=Slots(slots=8))
    x = gaussian(7, 1, 4, 8)
    assert torch.equal(codec.decode(codec.encode(x)), x.half().float())


@pytest.mark.parametrize("range_", [MinMax(), AbsMax()], ids=["minmax", "absmax"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-9])
def test_constant_groups(value, range_):
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="tokens", size=8), range=range_)
    x = torch.full((1, 8, 16), value)
    decoded = codec.decode(codec.encode(x))
    assert ((decoded - x).abs() <= 4 * UNIT * abs(value) + 4 * TINY).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_beyond_fp16_saturate_and_harm_no_other_group(dtype):
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels", size=8))
    x = gaussian(8, 1, 4, 32).to(dtype)
    calm = codec.decode(codec.encode(x))
    x[0, 1, 3], x[0, 2, 9] = 3e5, -1e30
    decoded = codec.decode(codec.encode(x))
    assert decoded.isfinite().all()
    touched = torch.zeros(1, 4, 32, dtype=torch.bool)
    touched[0, 1, :8] = touched[0, 2, 8:16] = True
    assert torch.equal(decoded[~touched], calm[~touched])
    assert decoded[0, 1, :8].argmax() == 3 and decoded[0, 2, 8:16].argmin() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_input_types_give_the_same_codes_as_their_fp32_values(dtype):
    codec = Codec(levels=Uniform(bits=3), grouping=Grouping(along="tokens", size=32))
    x = gaussian(9, 2, 32, 40).to(dtype)
    ours, wide = codec.encode(x), codec.encode(x.float())
    assert all(torch.equal(ours[name], wide[name]) for name in wide)
    assert codec.decode(ours).dtype == torch.float32


@pytest.mark.parametrize("outliers", [False, True])
def test_error_falls_when_bits_rise(outliers):
    x = gaussian(10, 2, 64, 64)
    if outliers:
        x[:, :, 5] *= 20
    for grouping in GROUPINGS:
        errors = []
        for bits in (1, 2, 3, 4, 8):
            codec = Codec(levels=Uniform(bits=bits), grouping=grouping)
            errors.append(float((codec.decode(codec.encode(x)) - x).norm() / x.norm()))
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_hadamard_space_decodes_back_and_keeps_scores():
    codec = Codec(levels=Uniform(bits=8), grouping=Grouping(along="channels"), transform=Hadamard())
    k, q = gaussian(11, 2, 16, 96), gaussian(12, 2, 1, 96)
    arrays = codec.encode(k)
    there = codec.decode(arrays, inverse=False)
    back = codec.decode(arrays)
    rotated = codec.transform.forward(q) @ there.transpose(-1, -2)
    torch.testing.assert_close(rotated, q @ back.transpose(-1, -2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, k, rtol=0, atol=float(k.norm(dim=-1).max()) / 255)
