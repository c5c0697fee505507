"""KVQuant's formulas by hand or against slow loops; and the recipe that they make."""

import math

import numpy as np
import pytest
import torch
from models_tiny import tiny_llama
from torch import Tensor

import kvist
from kvist import methods
from kvist.artifact import Artifact, Fit, Origin, Settings
from kvist.coding import Codec, Fixed, Grouping, Identity, NoOutliers, Slots, Table, Unrotate
from kvist.methods.kvquant import HEAD, TOKEN, key_codec, recipe, value_codec
from kvist.types import HOLD, Geometry, ModelIdentity

LADDER = Table(bits=2, points=(-1.0, -0.5, 0.5, 1.0))
FINE = Table(bits=4, points=tuple(np.linspace(-1, 1, 16).tolist()))


def fixed(low: list[float], high: list[float], **options) -> Codec:
    return Codec(levels=LADDER, grouping=HEAD, range=Fixed(low=tuple(low), high=tuple(high)), **options)


def there_and_back(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x))


def test_thresholds_are_rounded_to_fp16_before_zero_point_and_scale():
    """hi = 2049.9, lo = 1: in fp16 2050 and 1, whose sum 2051 is no fp16 number: 2052, so z = 1026, and s = 1024.5 to
    1024. Formed first and rounded last, 1025.45 would give z = 1025 and s = 1024.45 = 1024."""
    codec = fixed([1.0] * 8, [2049.9] * 8)
    scale, middle = (x.flatten()[0].item() for x in codec._fixed(1, torch.device("cpu")))
    assert (scale, middle) == (1024.0, 1026.0) == (np.float16(2049) / 2, (np.float16(2050) + np.float16(1)) / 2)
    assert np.float16((2049.9 + 1) / 2) == 1025


def test_zero_point_and_scale_are_those_of_fp16_arithmetic():
    random = np.random.default_rng(0)
    low, high = np.sort(random.normal(0, 30, (2, 64)), 0)
    scale, middle = (x.flatten().numpy() for x in fixed(low, high)._fixed(2, torch.device("cpu")))
    a, b = low.astype(np.float16), high.astype(np.float16)
    assert np.array_equal(scale, (b - a) / np.float16(2)) and np.array_equal(middle, (b + a) / np.float16(2))
    late = ((high + low) / 2).astype(np.float16)
    assert (late != middle).any()  # the order of rounding shows in these numbers


def test_the_zero_point_is_neither_rounded_nor_clamped():
    """A channel far from zero: lo = 100, hi = 101, z = 100.5, s = 0.5; points at 100, 100.25, 100.75, 101."""
    x = torch.tensor([100.0, 100.1, 100.2, 100.5, 100.6, 100.8, 100.9, 101.0])
    wanted = [100.0, 100.0, 100.25, 100.25, 100.75, 100.75, 101.0, 101.0]
    codec = fixed([100.0] * 8, [101.0] * 8)
    assert there_and_back(codec, x.view(1, 1, 8)).flatten().tolist() == wanted


def test_nearest_point_and_ties_to_the_lower():
    """lo = -2, hi = 2: z = 0, s = 2; points at -2, -1, 1, 2; midpoints -1.5, 0 and 1.5 go down, what is beyond stays at
    the ends."""
    x = torch.tensor([-1.5, -1.49, 0.0, 0.01, 1.5, 1.51, 9.0, -9.0])
    codec = fixed([-2.0] * 8, [2.0] * 8)
    assert there_and_back(codec, x.view(1, 1, 8)).flatten().tolist() == [-2, -1, -1, 1, 1, 2, 2, -2]
    fast, slow = codec.encode(x.view(1, 1, 8)), codec._reference(x.view(1, 1, 8))
    assert fast["clipped"].item() == slow["clipped"].item() == 2
    assert torch.equal(fast["codes"], slow["codes"])
    assert torch.equal(codec._decoded(slow), codec.decode(fast))


def test_each_channel_has_its_own_range():
    low, high = [0.0, -4.0] * 4, [2.0, 4.0] * 4
    codec = fixed(low, high)
    x = torch.tensor([[0.4, 1.9], [0.6, -1.9]]).repeat(1, 4).view(1, 2, 8)
    assert there_and_back(codec, x)[0, :, :2].tolist() == [[0.5, 2.0], [0.5, -2.0]]


def test_a_channel_without_spread_is_its_zero_point():
    codec = fixed([3.0] * 8, [3.0] * 8)
    assert there_and_back(codec, torch.full((1, 1, 8), 3.0)).flatten().tolist() == pytest.approx([3.0] * 8)


def test_values_are_normalised_by_what_stays_in_their_token():
    """Two heads of eight; 9 and -7 escape, one on each side; the rest spans -1 to 3: z = 1, s = 2; at -1, 0, 2, 3."""
    x = torch.tensor([[0.4, 0.6, 3.0, 9.0, 0.9, 1.1, 2.4, 2.6], [-1.0, -7.0, -0.6, -0.4, 0.0, 1.0, 2.0, 0.5]])
    codec = Codec(levels=LADDER, grouping=TOKEN, outliers=Slots(slots=2))
    arrays = codec.encode(x.unsqueeze(1))
    assert (arrays["scale"].item(), arrays["offset"].item()) == (2.0, 1.0)
    assert arrays["outlier"].tolist() == [[9.0, -7.0]] and arrays["channel"].tolist() == [[3, 1]]
    assert arrays["ends"].tolist() == [[1, 2]]
    wanted = [[0, 0, 3, 9, 0, 2, 2, 3], [-1, -7, -1, 0, 0, 0, 2, 0]]
    assert codec.decode(arrays)[:, 0].tolist() == wanted


def slow_extremes(row: list[float], slots: int) -> set[int]:
    """slots/2 times the least, and the greatest, of what is left."""
    left, gone = list(range(len(row))), set()
    for _ in range(slots // 2):
        for best in (min(left, key=lambda c: (row[c], c)), max(left, key=lambda c: (row[c], c))):
            gone.add(best)
        left = [c for c in left if c not in gone]
    return gone


@pytest.mark.parametrize("ties", [False, True])
def test_order_statistics_over_all_heads_with_ties_neither_doubled_nor_lost(ties):
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0)).half().float()
    x = (x * 2).round() / 2 if ties else x
    codec = Codec(levels=FINE, grouping=TOKEN, outliers=Slots(slots=6))
    arrays, back = codec.encode(x), there_and_back(codec, x)
    for t in range(x.shape[1]):
        row = x[:, t].flatten().tolist()
        gone, counts = slow_extremes(row, 6), arrays["ends"][t].tolist()
        heads = [sum(end <= slot for end in counts) for slot in range(6)]
        channels = [16 * head + c for head, c in zip(heads, arrays["channel"][t].tolist(), strict=True)]
        assert channels == sorted(set(channels)) and len(channels) == 6
        assert sorted(row[c] for c in channels) == sorted(row[c] for c in gone)
        if not ties:
            assert set(channels) == gone
        rest = [row[c] for c in range(48) if c not in channels]
        assert arrays["scale"][t].item() == np.float16((max(rest) - min(rest)) / 2)
        assert arrays["offset"][t].item() == np.float16((max(rest) + min(rest)) / 2)
        decoded = back[:, t].flatten().tolist()
        assert all(decoded[c] == row[c] for c in channels)
        assert max(abs(decoded[c] - row[c]) for c in range(48)) <= (max(rest) - min(rest)) / 30 * 1.01


def test_a_token_of_equal_values():
    codec = Codec(levels=FINE, grouping=TOKEN, outliers=Slots(slots=4))
    x = torch.full((2, 3, 8), 1.5)
    assert torch.equal(there_and_back(codec, x), x)


@pytest.mark.parametrize("rank", ["sides", "largest"])
def test_dense_and_sparse_do_not_disturb_each_other(rank):
    """Outliers come back exact; however far out they lie, the other numbers stay what they are."""
    ends = Fixed(low=(-1.0,) * 32, high=(1.0,) * 32)
    codec = Codec(levels=FINE, grouping=HEAD, range=ends, outliers=Slots(slots=2, rank=rank))
    x = torch.rand(2, 20, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    x[0, :, 3], x[1, :, 9] = 1.5, -1.75
    calm, wild = there_and_back(codec, x), x.clone()
    wild[0, :, 3], wild[1, :, 9] = 6e4, -3e4
    assert torch.equal(calm[0, :, 3], x[0, :, 3]) and torch.equal(calm[1, :, 9], x[1, :, 9])
    loud = there_and_back(codec, wild)
    others = torch.ones(2, 16, dtype=torch.bool)
    others[0, 3] = others[1, 9] = False
    assert torch.equal(loud.movedim(1, 0)[:, others], calm.movedim(1, 0)[:, others])
    assert torch.equal(loud[0, :, 3], wild[0, :, 3].half().float())
    assert codec.encode(wild)["clipped"].item() == 0


@pytest.mark.parametrize(
    ("channels", "share", "slots"),
    [
        (4096, 0.01, 42),
        (1024, 0.01, 12),
        (128, 0.01, 2),
        (4096, 0.005, 22),
        (4096, 0.0001, 2),
        (100, 0.14, 14),  # 0.14 · 100 is a little more than 14 in floating point
        (600, 0.01, 6),
        (3200, 0.01, 32),
    ],
)
def test_budget(channels, share, slots):
    assert Slots(share=share).count(channels) == slots == 2 * math.ceil(round(share / 2 * channels, 9))


def test_q_norm_keeps_codes_and_moves_what_is_read():
    read = (-0.9, -0.4, 0.6, 1.1)
    moved = LADDER.model_copy(update={"read": read})
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    for codec in (
        Codec(levels=LADDER, grouping=TOKEN, outliers=Slots(slots=4)),
        Codec(levels=LADDER, grouping=HEAD, range=Fixed(low=(-2.0,) * 32, high=(1.0,) * 32)),
    ):
        other = codec.model_copy(update={"levels": moved})
        plain, normed = codec.encode(x), other.encode(x)
        assert all(torch.equal(plain[name], normed[name]) for name in plain)
        found = codec.normalised(x)
        wanted = torch.tensor(read)[torch.tensor(LADDER.points).sub(found.u.unsqueeze(-1)).abs().argmin(-1)]
        offset = (x - found.u * found.scale).double()
        stays = torch.ones_like(x, dtype=torch.bool) if found.escaped is None else ~found.escaped
        back = (wanted * found.scale + offset)[stays]
        assert torch.allclose(other.decode(normed)[stays].double(), back.double(), atol=1e-5)
        assert not torch.equal(other.decode(normed), codec.decode(plain))


def test_uncapped_slots_go_to_the_largest_and_the_overflow_is_clipped_and_counted():
    """Range -1..1. Three entries beyond in the first token, and two slots: 5 and -4 have them, 3 becomes 1. One beyond
    in the second: the other slot holds the largest of the rest."""
    codec = fixed([-1.0] * 16, [1.0] * 16, outliers=Slots(slots=2, rank="largest"))
    x = torch.zeros(2, 2, 8)
    x[0, 0, 1], x[0, 0, 4], x[1, 0, 2] = 3.0, 5.0, -4.0
    x[1, 1, 7], x[0, 1, 0] = -2.0, 0.75
    arrays = codec.encode(x)
    assert arrays["clipped"].item() == 1
    assert arrays["outlier"].tolist() == [[5.0, -4.0], [0.75, -2.0]]
    assert arrays["ends"].tolist() == [[1, 2], [1, 2]]
    back = codec.decode(arrays)
    assert (back[0, 0, 1], back[0, 0, 4], back[1, 0, 2]) == (1.0, 5.0, -4.0)
    assert (back[1, 1, 7], back[0, 1, 0], back[0, 0, 0]) == (-2.0, 0.75, -0.5)


def test_largest_is_by_the_channels_own_range():
    """0.4 in a channel of ±0.1 lies further out than 5 in a channel of ±4."""
    codec = fixed([-4.0] * 8 + [-0.1] * 8, [4.0] * 8 + [0.1] * 8, outliers=Slots(slots=2, rank="largest"))
    x = torch.zeros(2, 1, 8)
    x[0, 0, 2], x[1, 0, 3], x[1, 0, 5] = 5.0, 0.4, -0.3
    arrays = codec.encode(x)
    assert arrays["outlier"][0].tolist() == pytest.approx([0.4, -0.3], abs=1e-3) and arrays["clipped"].item() == 1


def made_up(bits: int, outliers: float, heads: int = 8, dim: int = 128, **settings) -> Artifact:
    table = Table(bits=bits, points=tuple(np.linspace(-1, 1, 2**bits).tolist()))
    channels = heads * dim
    return Artifact(
        model=ModelIdentity(name="x", kind="llama", config="", layers=1, heads=heads, key_dim=dim, value_dim=dim),
        settings=Settings(bits=bits, outliers=outliers, **settings),
        origin=Origin(source="", digest=""),
        rotary=Unrotate(frequencies=(0.1,) * (dim // 2)),
        keys=(Fit(table=table, range=Fixed(low=(-1.0,) * channels, high=(1.0,) * channels)),),
        values=(Fit(table=table),),
    )


@pytest.mark.parametrize(("bits", "most"), [(4, 4.45), (3, 3.45), (2, 2.45)])
def test_stored_bits(bits, most):
    """Codes; 12 slots of an fp16 number and a byte per 1,024; an end per head; a range per token of values. Beside
    them, tokens of the last update that wait exact."""
    shape, length = Geometry(8, 128, 128, torch.bfloat16), 32 * 1024
    found = recipe(made_up(bits, 0.01)).bits_per_element(shape, 1, length)
    wait = 16 * HOLD / length
    by_hand = bits + (12 * (16 + 8) + 8 * 8) / 1024 + 32 / 1024 / 2 + wait
    assert by_hand <= found <= most and found == pytest.approx(by_hand, abs=0.002)
    dense = recipe(made_up(bits, 0.0)).bits_per_element(shape, 1, length)
    assert dense == pytest.approx(bits + 32 / 1024 / 2 + wait, abs=0.002)


def test_which_codec_serves_which_side():
    fit = Fit(table=FINE, range=Fixed(low=(-1.0,) * 64, high=(1.0,) * 64))
    capped, plain = Settings(bits=4, outliers=0.05), Fit(table=FINE)
    key, value = key_codec(capped, fit, Unrotate()), value_codec(capped, plain)
    assert key.range == fit.range and key.outliers == value.outliers == Slots(share=0.05)
    assert value.grouping == Grouping(along="channels", across_heads=True) and value.transform == Identity()
    uncapped = capped.model_copy(update={"cap": "none", "slots": 6})
    assert key_codec(uncapped, fit, None).outliers == Slots(slots=6, rank="largest")
    assert value_codec(uncapped, plain).outliers == Slots(share=0.05)  # the cap is about keys
    assert key_codec(capped, plain, None) == value_codec(capped, plain)  # keys per token
    assert key_codec(Settings(bits=4, outliers=0), fit, None).outliers == NoOutliers()


@pytest.mark.parametrize("text", ["kvquant bits=4 outliers=2%", "kvquant:4 outliers=0.02"])
def test_what_is_not_fitted_says_so(text):
    found = methods.parse(text)
    assert found.needs == ("a fitted table", "a model's rotary", "fitted ranges")
    assert found.layers[0].value.codec.outliers == Slots(share=0.02) and found.layers[0].sinks == 1
    with pytest.raises(ValueError, match=r"kvquant needs .*kvist calibrate MODEL.*artifact=DIR"):
        kvist.Cache(tiny_llama(), found)


@pytest.mark.parametrize("zero", ["0", 0, 0.0, "0%"])
def test_no_outliers(zero):
    assert methods.get("kvquant", outliers=zero).layers[0].key.codec.outliers == NoOutliers()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": 1}, "bits"),
        ({"bits": (2, 3)}, "bits"),
        ({"outliers": "many"}, "share of the channels"),
        ({"outliers": "50%"}, "below half"),
        ({"outliers": "-1%"}, "share of the channels"),
        ({"outliers": "nan"}, "share of the channels"),
        ({"sinks": -1}, "sinks"),
        ({"recent": -4}, "size"),
        ({"artefact": "x"}, "did you mean 'artifact'"),
        ({"artifact": "/none"}, "No such file"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        methods.get("kvquant", **options)
    assert "\n" not in str(caught.value)


def test_options_that_contradict_the_artefact(tmp_path):
    made_up(3, 0.05).save(tmp_path)
    folder = str(tmp_path)
    for options, words in (
        ({"bits": 4}, "for 3 bits"),
        ({"outliers": "1%"}, "5.00% out"),
        ({"outliers": 0}, "5.00% out"),
    ):
        with pytest.raises(ValueError, match=words):
            methods.get("kvquant", artifact=folder, **options)
    same = methods.get("kvquant", artifact=folder, bits=3, outliers="5%")
    assert same == methods.parse(f"kvquant artifact={folder}") == recipe(Artifact.load(folder))
    other = methods.get("kvquant", artifact=folder, sinks=4, recent=16).layers[0]
    assert other.sinks == 4 and other.key.window() >= 16
