"""Numbers per channel are for the model's channels, or refused in one sentence before compiled code reads them."""

import pytest
import torch
from models_tiny import tiny_llama

import kvist
from kvist.coding import Codec, Fixed, Grouping, Slots, Table, Uniform, Unrotate
from kvist.models.rope import rotary
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate

HEADS, DIM = 2, 32
ALONG = Grouping(along="channels")


def ranges(channels: int) -> Fixed:
    return Fixed(low=(-1.0,) * channels, high=(1.0,) * channels)


def recipe(key: Codec) -> Recipe:
    value = Side(codec=Codec(levels=Uniform(bits=2), grouping=ALONG), retention=Immediate())
    return Recipe(name="by hand", layers=(LayerPlan(key=Side(codec=key, retention=Immediate()), value=value),))


@pytest.mark.parametrize("ladder", [Uniform(bits=2), Table(bits=2, points=(-1.0, -0.3, 0.4, 1.0))])
@pytest.mark.parametrize("channels", [1, 2, 4, 8, 32, 60, 63, 65, 128, 252])
def test_fixed_ranges_of_other_channels(channels, ladder):
    codec = Codec(levels=ladder, grouping=ALONG, range=ranges(channels))
    right = Codec(levels=ladder, grouping=ALONG, range=ranges(HEADS * DIM))
    x = torch.randn(1, HEADS, 64, DIM)
    words = f"fixed ranges of {channels} channels, the model 2 KV heads of 32, 64 channels"
    with pytest.raises(ValueError, match=words):
        codec.encode(x)
    arrays = right.encode(x)
    with pytest.raises(ValueError, match=words):
        codec.decode(arrays)
    cache = kvist.Cache(tiny_llama(), recipe(codec))
    cache.inner.rows.extend(1, 64, None)
    with pytest.raises(ValueError, match=words):  # at the first tensor, before any is stored
        cache.layers[0].update(x, x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_channels_are_known_from_codes(bits):
    ladder = Uniform(bits=bits) if bits != 5 else Table(bits=5, points=tuple(i / 31 for i in range(32)))
    codec = Codec(levels=ladder, grouping=ALONG, range=ranges(HEADS * DIM))
    x = torch.randn(1, HEADS, 8, DIM).clamp(-1, 1)
    assert codec.decode(codec.encode(x)).shape == x.shape


def test_a_rotary_of_larger_heads_is_refused():
    frequencies = tuple(1.0 / (i + 1) for i in range(DIM))
    codec = Codec(levels=Uniform(bits=4), grouping=ALONG, transform=Unrotate(frequencies=frequencies))
    x = torch.randn(1, HEADS, 8, DIM)
    with pytest.raises(ValueError, match="turns 64 channels of each head by RoPE, the model's heads have 32"):
        codec.encode(x, torch.arange(8)[None])
    with pytest.raises(ValueError, match="rotary embedding differs"):
        kvist.Cache(tiny_llama(), recipe(codec))
    assert rotary(tiny_llama()).frequencies


def test_more_outliers_than_channels_are_refused():
    codec = Codec(levels=Uniform(bits=2), grouping=ALONG, outliers=Slots(slots=128))
    with pytest.raises(ValueError, match="128 outliers per token of 64 channels are too many"):
        codec.encode(torch.randn(1, HEADS, 8, DIM))


def test_what_is_not_fitted_is_refused():
    codec = Codec(levels=Table(bits=2), grouping=ALONG, range=Fixed())
    with pytest.raises(ValueError, match="calibrate"):
        codec.encode(torch.randn(1, HEADS, 8, DIM))
