"""The fast CPU kernels over tables, fixed ranges, scales across heads, outliers, and keys before their rotation."""

import pytest
import torch
from asking import ask
from drawn import codec_of, coded, table_of, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.coding import Codec, Grouping, Identity, NoOutliers, Slots, Uniform, Unrotate
from kvist.kernels.contract import Stored
from kvist.kernels.reference.attend import attend
from kvist.kernels.reference.rotary import turn

pytest.importorskip("numba")
pytestmark = pytest.mark.numerical
CPU = torch.device("cpu")
PAGE = 64


def _coder(codec, heads):
    constants = codec.constants(heads, CPU)
    encode, decode = ask("ENCODE", codec).run, ask("DECODE", codec).run
    return lambda x: encode(x, constants, codec._slots(x)), lambda arrays: decode(arrays, constants)


def _same(codec, x):
    encode, decode = _coder(codec, x.shape[-3])
    expected, found = codec._reference(x), encode(x)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name
    stored = {name: array for name, array in found.items() if name != "clipped"}
    assert torch.equal(decode(stored), codec._decoded(stored))


@settings(max_examples=150, deadline=None)
@given(coded())
def test_encoder_and_decoder_give_the_reference_to_the_bit(drawn):
    _same(*drawn)


@pytest.mark.parametrize("slots", [2, 254])
def test_wide_heads_number_their_channels_in_two_bytes(slots):
    for codec, x in wide(slots):
        _same(codec, x)


def test_of_equal_entries_the_first_are_lowest_and_the_last_highest():
    codec = codec_of("token", Uniform(bits=4), 16, 4, torch.Generator())
    x = torch.zeros(2, 1, 8)
    x[0, 0, 5], x[1, 0, 1] = -1.0, 1.0
    encode, decode = _coder(codec, 2)
    found = encode(x)
    # lowest: (0, 5) and the first zero, (0, 0); highest: (1, 1) and the last zero, (1, 7)
    assert found["channel"].tolist() == [[0, 5, 1, 7]] and found["ends"].tolist() == [[2, 4]]
    assert found["outlier"].tolist() == [[0.0, -1.0, 1.0, 0.0]]
    assert found["scale"].item() == 0.0 and torch.equal(decode(found), x)


def test_halves_are_rounded_and_saturated_as_torch_does():
    from kvist.kernels.numba.codes import half, number
    from kvist.kernels.reference.grid import narrow

    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2  # ties
    x = torch.cat(
        [halves, middles, middles * (1 + 2**-23), middles * (1 - 2**-23), torch.tensor([65519.9, 65520, 1e30])]
    )
    x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf])])
    expected = narrow(x)
    found = torch.tensor([half(v) for v in x.numpy()], dtype=torch.int32).to(torch.int16).view(torch.float16)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    back = torch.tensor([number(h) for h in expected.view(torch.int16).numpy().view("uint16")])
    assert torch.equal(back, expected.float())


def test_a_damaged_outlier_is_not_written_beyond_its_head():
    codec = codec_of("token", Uniform(bits=4), 16, 4, torch.Generator())
    encode, decode = _coder(codec, 2)
    arrays = encode(torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0)))
    whole = decode(arrays)
    arrays["channel"][0, 1], arrays["ends"][0, 2] = 200, 255
    x = decode(arrays)
    assert torch.equal(x[:, :, 0], whole[:, :, 0]) and torch.isfinite(x).all()


def _pages(codec, x, at=None):
    """Values (B, H, T, D), rotated for positions at (B, T), as shuffled pages in a pool of garbage; and what they
    decode to, fp64, in the transformed space."""
    batch, heads, tokens, dim = x.shape
    encode, _ = _coder(codec, heads)
    encoded = encode(codec.transform.forward(x, at))
    encoded.pop("clipped", None)
    count, specs, pools = -(-tokens // PAGE), codec.layout(heads, dim, torch.float32), {}
    order = torch.randperm(batch * count + 3)[: batch * count].view(batch, count)
    for name, array in encoded.items():
        shape, step = specs[name].page_shape(heads, PAGE), PAGE // specs[name].stride
        garbage = torch.nan if array.is_floating_point() else 255
        pool = torch.full((batch * count + 3, *shape), garbage, dtype=array.dtype)
        for b in range(batch):
            for p in range(count):
                part = array[b, ..., p * step : (p + 1) * step, :]
                pool[order[b, p]][..., : part.shape[-2], :] = part
        pools[name] = pool
    return Stored(pools, order.int(), codec.constants(heads, CPU)), codec._decoded(encoded).double()


def _rotated(x, at, codec):
    """Decoded keys as rotated for positions at (B, T), in fp64."""
    if not isinstance(codec.transform, Unrotate):
        return x
    angles = at.double()[:, None, :, None] * torch.tensor(codec.transform.frequencies).double()
    return turn(x, angles.cos() * 1.25, angles.sin() * 1.25, False)


def _frequencies(pairs):
    return tuple((10000.0 ** -(torch.arange(pairs) / max(pairs, 1))).tolist())


def _check(key, value, heads, dim, tokens, *, origins=(0, 5, 9), softcap=None, queries=2, seed=0):
    torch.manual_seed(seed)
    limits = [tokens, max(0, tokens - 37), 0]
    at = torch.tensor(origins)[:, None] + torch.arange(tokens)
    (k, keys), (v, values) = (
        _pages(key, torch.randn(3, heads, tokens, dim), at),
        _pages(value, torch.randn(3, heads, tokens, dim)),
    )
    skip = torch.rand(3, tokens) < 0.1
    q = torch.randn(3, 2 * heads, queries, dim)
    fast = ask("PAGES", key, value).run
    starts = list(origins) if key.traits.rotary else None
    out, lse = fast(q, k, v, limits, skip, PAGE, 0.3, softcap, starts)
    seen = (torch.arange(tokens) < torch.tensor(limits).unsqueeze(-1)) & ~skip
    keys = _rotated(keys, at, key).float()
    expected = attend(q, keys, values.float(), 0.3, seen[:, None, None], softcap=softcap)
    torch.testing.assert_close(out, expected.out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse[:2], expected.lse[:2], rtol=1e-4, atol=1e-4)
    assert (lse[2] == -torch.inf).all() and (out[2] == 0).all()


@settings(max_examples=80, deadline=None)
@given(
    bits=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tables=st.tuples(st.booleans(), st.booleans()),
    kinds=st.tuples(*[st.sampled_from(["fixed", "token", "head", 32])] * 2),
    heads=st.integers(1, 3),
    dim=st.integers(1, 20).map(lambda n: 8 * n),
    slots=st.tuples(*[st.sampled_from([0, 2, 8])] * 2),
    pairs=st.integers(0, 80),
    tokens=st.integers(1, 200),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 2**16),
)
def test_attention_over_pages_equals_attention_over_decoded_tokens(
    bits, tables, kinds, heads, dim, slots, pairs, tokens, softcap, seed
):
    generator = torch.Generator().manual_seed(seed)
    codecs = []
    for b, table, kind, slot, rotary in zip(bits, tables, kinds, slots, (min(pairs, dim // 2), 0), strict=True):
        levels = table_of(b, generator) if table else Uniform(bits=8 if b == 5 else b)
        codecs.append(codec_of(kind, levels, heads * dim, slot, generator, _frequencies(rotary)))
    _check(*codecs, heads, dim, tokens, softcap=softcap, seed=seed)


@pytest.mark.parametrize("pairs", [0, 8, 32])
@pytest.mark.parametrize("table", [False, True])
def test_keys_that_share_ranges_along_tokens(pairs, table):
    generator = torch.Generator().manual_seed(pairs)
    levels = table_of(3, generator) if table else Uniform(bits=3)
    turned = Unrotate(frequencies=_frequencies(pairs), scaling=1.25) if pairs else Identity()
    for outliers in (NoOutliers(), Slots(slots=4)):
        key = Codec(levels=levels, grouping=Grouping(along="tokens", size=32), outliers=outliers, transform=turned)
        _check(key, codec_of("token", Uniform(bits=2), 128, 2, generator), 2, 64, 160)


@pytest.mark.parametrize("origin", [0, 99_997, 3_000_000])
def test_far_positions_are_as_exact_as_near_ones(origin):
    generator = torch.Generator().manual_seed(0)
    key = codec_of("fixed", table_of(4, generator), 128, 4, generator, _frequencies(32))
    value = codec_of("token", table_of(4, generator), 128, 4, generator)
    _check(key, value, 2, 64, 40 * PAGE, origins=(origin, origin + 1, 7))


def test_outliers_of_heads_wider_than_a_byte_are_left_to_the_reference():
    generator = torch.Generator().manual_seed(0)
    key = codec_of("fixed", table_of(2, generator), 528, 6, generator, _frequencies(132))
    value = codec_of("token", table_of(2, generator), 528, 6, generator)
    refused = ask("PAGES", key, value, dims=(264, 264)).refused
    assert "keys have outliers, and heads of more than 256" in str(refused)
    with pytest.raises(ValueError, match="found heads of 264"):  # whoever does not ask first is told
        _check(key, value, 2, 264, 70)


def test_threads_do_not_change_the_result_beyond_rounding():
    generator = torch.Generator().manual_seed(0)
    key = codec_of("fixed", table_of(3, generator), 64, 2, generator, _frequencies(32))
    value = codec_of("token", table_of(3, generator), 64, 2, generator)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):  # several threads cut a row: each piece starts at its own angle
            torch.set_num_threads(threads)
            _check(key, value, 1, 64, 70 * PAGE, origins=(12, 40_000, 0), queries=1)
    finally:
        torch.set_num_threads(before)
