"""Codecs of every kind and values for them, drawn at random: what every encoder must code as the reference does."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvist.coding import Codec, Fixed, Grouping, Identity, MinMax, NoOutliers, Slots, Table, Uniform, Unrotate


def table_of(bits, generator):
    points = torch.randn(2**bits, generator=generator).sort().values
    points = points / points.abs().max()
    read = (points + 0.05 * torch.randn(2**bits, generator=generator)).sort().values
    return Table(bits=bits, points=tuple(points.tolist()), read=tuple(read.tolist()))


def fixed_of(channels, generator):
    low = torch.randn(channels, generator=generator) - 1.5
    high = low + 3 * torch.rand(channels, generator=generator)
    high[1] = low[1]  # a channel that was constant when it was measured
    return Fixed(low=tuple(low.tolist()), high=tuple(high.tolist()))


def codec_of(kind, levels, channels, slots, generator, rotary=(), rank="sides"):
    """kind: "fixed", "token" (one range over all heads), "head", "tokens" (8 of a channel), or channels of a group."""
    size = 8 if kind == "tokens" else kind if isinstance(kind, int) else None
    return Codec(
        levels=levels,
        grouping=Grouping(along="tokens" if kind == "tokens" else "channels", across_heads=kind == "token", size=size),
        range=fixed_of(channels, generator) if kind == "fixed" else MinMax(),
        outliers=Slots(slots=slots, rank=rank) if slots else NoOutliers(),
        transform=Unrotate(frequencies=rotary, scaling=1.25) if rotary else Identity(),
    )


@st.composite
def coded(draw) -> tuple[Codec, Tensor]:
    """A codec, and values that meet ties, equal numbers, and what fp16 cannot hold."""
    bits, table = draw(st.sampled_from([1, 2, 3, 4, 5])), draw(st.booleans())
    kind = draw(st.sampled_from(["fixed", "token", "head", "tokens", 32]))
    rank = draw(st.sampled_from(["sides", "largest"])) if kind == "fixed" else "sides"
    heads, dim = draw(st.integers(1, 5)), 8 * draw(st.integers(1, 20))
    slots, lead = draw(st.sampled_from([0, 2, 4, 6, 12, 42])), draw(st.sampled_from([(), (1,), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    levels = table_of(bits, generator) if table else Uniform(bits=8 if bits == 5 else bits)
    codec = codec_of(kind, levels, heads * dim, min(slots, heads * dim), generator, rank=rank)
    tokens = draw(st.integers(1, 9)) * codec.granule
    x = 3 * torch.randn(*lead, heads, tokens, dim, generator=generator)
    values = draw(st.sampled_from(["many", "few", "equal"]))
    if values == "few":  # ties: outliers, extremes and halves between points all meet equals
        x = x.round() / 2
    elif values == "equal":
        x = torch.full_like(x, 0.3)
    x[..., 0, :] *= 1e6  # beyond fp16: stored outliers and offsets saturate
    x[..., -1, 3] = 0.0
    return codec, x


def wide(slots: int):
    """Codecs and values of heads so wide that a channel's number takes two bytes."""
    generator = torch.Generator().manual_seed(slots)
    for kind in ("fixed", "token"):
        codec = codec_of(kind, table_of(3, generator), 2 * 264, slots, generator)
        x = torch.randn(2, 2, 5, 264, generator=generator)
        assert codec._reference(x)["channel"].dtype == torch.int16
        yield codec, x
