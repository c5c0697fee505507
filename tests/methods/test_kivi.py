"""KIVI on numbers small enough to check by hand, and its two streaming rules in a living layer."""

import pytest
import torch

from kvist import methods
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.coding import Codec, Grouping, Uniform


def layer_of(recipe, rows: Rows) -> Layer:
    return Layer(recipe.for_layers(1)[0], recipe.page, recipe.prefill, 0, rows)


def test_keys_share_a_range_along_tokens():
    """Two channels of eight tokens. Channel 0 spans 0..6: step 2. Channel 1 spans -30..30: step 20. Halves to even."""
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="tokens", size=8))
    channels = torch.zeros(8, 8)
    channels[:, 0] = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 6])
    channels[:, 1] = torch.tensor([-30.0, -21, -19, -10, 0, 10, 12, 30])
    arrays = codec.encode(channels.unsqueeze(0))
    assert arrays["scale"][0, 0, :3].tolist() == [2.0, 20.0, 0.0]
    assert arrays["offset"][0, 0, :3].tolist() == [0.0, -30.0, 0.0]
    decoded = codec.decode(arrays)[0]
    # 1/2 -> 0, 3/2 -> 2, 5/2 -> 2 and (-10+30)/20 = 1, (0+30)/20 = 1.5 -> 2, (10+30)/20 = 2, (12+30)/20 = 2.1 -> 2
    assert decoded[:, 0].tolist() == [0, 0, 2, 4, 4, 4, 6, 6]
    assert decoded[:, 1].tolist() == [-30, -30, -10, -10, 10, 10, 10, 30]


def test_values_share_a_range_along_channels():
    """One token of eight channels in one group: low -3, high 6, step 3."""
    codec = Codec(levels=Uniform(bits=2), grouping=Grouping(along="channels", size=8))
    token = torch.tensor([[[-3.0, -2.0, -1.4, 0.0, 1.0, 2.9, 4.4, 6.0]]])
    arrays = codec.encode(token)
    assert (arrays["scale"].item(), arrays["offset"].item()) == (3.0, -3.0)
    assert codec.decode(arrays).flatten().tolist() == [-3, -3, 0 - 0, 0, 0, 3, 3, 6]


def test_an_outlier_channel_of_the_keys_harms_no_other_channel():
    x = torch.randn(1, 32, 16)
    loud = x.clone()
    loud[..., 5] *= 100
    recipe = methods.get("kivi", bits=2)
    key, value = (side.codec for side in recipe.layers[0].sides)
    others = [d for d in range(16) if d != 5]
    calm, noisy = (key.decode(key.encode(t))[..., others] for t in (x, loud))
    assert torch.equal(calm, noisy)
    assert not torch.equal(*(value.decode(value.encode(t))[..., others] for t in (x, loud)))


@pytest.mark.parametrize("prompt", [10, 64, 65, 128, 200])
@pytest.mark.parametrize("values", ["sliding", "block"])
def test_the_two_streaming_rules_in_a_living_layer(prompt, values):
    """What is packed at an update is what the published rules say of the length before it."""
    recent, group, rows = 64, 32, Rows()
    layer = layer_of(methods.get("kivi", group=group, recent=recent, values=values), rows)
    length = 0
    for count in [prompt, *[1] * 140]:
        rows.extend(1, count, None)
        layer.update(torch.randn(1, 2, count, 8), torch.randn(1, 2, count, 8))
        keys = length // recent * recent
        expected = [keys, keys if values == "block" else max(0, length - recent)]
        if length:
            assert [track.frontiers[0] for track in layer.tracks] == expected
        length += count


@pytest.mark.parametrize(("bits", "stored"), [(1, 2.0), (2, 3.0), (3, 4.0), (4, 5.0), (8, 9.0)])
def test_stored_bits_per_element_at_groups_of_32(bits, stored):
    """b + 32/G: codes, and a 16-bit scale and offset for every 32 numbers."""
    for side in methods.get("kivi", bits=bits).layers[0].sides:
        arrays = side.codec.encode(torch.randn(2, 64, 64))
        assert 8 * sum(array.nbytes for array in arrays.values()) / (2 * 64 * 64) == stored


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("v", [1, 4, 16])
def test_keys_and_values_have_their_own_bits(k, v):
    key, value = methods.get("kivi", k=k, v=v).layers[0].sides
    assert (key.codec.levels.bits, value.codec.levels.bits) == (k, v)
    assert (key.codec.raw, value.codec.raw) == (k == 16, v == 16)
