"""Fake quantization against plain loops over tokens and channels, written from the published rules."""

import math

import numpy as np
import pytest
import torch
from fitted import CHANNELS, DIM, HEADS, ROTARY, artifact
from hypothesis import given
from hypothesis import strategies as st
from models_tiny import tiny_llama, tokens

from kvist.artifact import Fit
from kvist.coding import Table
from kvist.evaluate.simulate import Simulated, quantiles, simulate
from kvist.methods import parse
from kvist.methods.kvquant import recipe
from kvist.models.compat import cache_argument

LENGTH = 24


def draw(seed: int, *, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(1, HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(seed))
    x[:, 1, :, 3] += 2
    return x.to(dtype)


def nearest(u: float, points) -> float:
    return min(points, key=lambda p: abs(p - u))


def slow_keys(x: np.ndarray, fit: Fit, cap: int | None, sinks: int) -> np.ndarray:
    """(H, T, D) before rotation: beyond a channel's thresholds, strictly, a key is an outlier; with a cap, at most so
    many of each side, the farthest in units of their channel."""
    out = x.copy()
    for t in range(sinks, x.shape[1]):
        u, wide = {}, []
        for h in range(x.shape[0]):
            for d in range(x.shape[2]):
                high, low = (np.float32(np.float16(end[h * DIM + d])) for end in (fit.range.high, fit.range.low))
                half, middle = np.float32(np.float16((high - low) / 2)), np.float32(np.float16((high + low) / 2))
                u[h, d] = (x[h, t, d] - middle) / half
                out[h, t, d] = np.float32(nearest(u[h, d], fit.table.points)) * half + middle
                if x[h, t, d] > high or x[h, t, d] < low:
                    wide.append((h, d))
        if cap is not None:
            above = sorted((c for c in wide if u[c] > 0), key=lambda c: -u[c])[:cap]
            below = sorted((c for c in wide if u[c] < 0), key=lambda c: u[c])[:cap]
            wide = above + below
        for h, d in wide:
            out[h, t, d] = x[h, t, d]
    return out


def slow_values(x: np.ndarray, table: Table, share: float, sinks: int) -> np.ndarray:
    """(H, T, D): at or beyond the quantiles of its token a value is an outlier; it is replaced by the token's median,
    and the range is that of what is then there."""
    out = x.copy()
    for t in range(sinks, x.shape[1]):
        token = x[:, t].astype(np.float64)
        low, high = np.quantile(token, [share / 2, 1 - share / 2])
        wide = (token <= low) | (token >= high) if share else np.zeros_like(token, bool)
        dense = np.where(wide, np.median(token), token)
        half = np.float32(np.float16((dense.max() - dense.min()) / 2))
        middle = np.float32(np.float16((dense.max() + dense.min()) / 2))
        for h in range(x.shape[0]):
            for d in range(x.shape[2]):
                if not wide[h, d]:
                    out[h, t, d] = np.float32(nearest((x[h, t, d] - middle) / half, table.points)) * half + middle
    return out


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("cap", ["token", "none"])
@pytest.mark.parametrize("outliers, slots", [(0.05, 0), (0.05, 4), (0.0, 0)])
def test_keys_after_rope_and_values_are_as_published(bits, cap, outliers, slots):
    fitted = artifact(bits, outliers, cap, keys="post-rope", slots=slots if cap == "none" else 0)
    keys, values = draw(1), draw(2)
    found = simulate(recipe(fitted).layers[0], keys, values)
    most = math.ceil(outliers * CHANNELS / 2) if cap == "token" or not outliers else None
    wanted = slow_keys(keys[0].numpy(), fitted.keys[0], most, 1)
    np.testing.assert_allclose(found[0][0].numpy(), wanted, rtol=0, atol=1e-6)
    wanted = slow_values(values[0].numpy(), fitted.values[0].table, outliers, 1)
    np.testing.assert_allclose(found[1][0].numpy(), wanted, rtol=0, atol=1e-6)


def test_the_ranges_above_put_the_cap_to_use():
    fit, keys = artifact().keys[0], draw(1)[0].movedim(0, 1).flatten(1)[1:]
    above = (keys > torch.tensor(fit.range.high).half()).sum(1)
    below = (keys < torch.tensor(fit.range.low).half()).sum(1)
    for side in (above, below):
        assert side.max() > 2 > side.min()


@pytest.mark.parametrize("cap", ["token", "none"])
def test_keys_before_rope(cap):
    fitted, before, at = artifact(cap=cap, sinks=2), draw(3), torch.arange(LENGTH)
    keys = ROTARY.inverse(before, at)
    found, _ = simulate(recipe(fitted).layers[1], keys, draw(4))
    wanted = slow_keys(before[0].numpy(), fitted.keys[1], 2 if cap == "token" else None, 2)
    np.testing.assert_allclose(ROTARY.forward(found, at)[0].numpy(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(found[:, :, :2], keys[:, :, :2])


def test_keys_per_token_follow_the_rule_of_values():
    fitted, keys = artifact(axis="token", keys="post-rope", sinks=0), draw(5)
    found, _ = simulate(recipe(fitted).layers[0], keys, draw(6))
    wanted = slow_values(keys[0].numpy(), fitted.keys[0].table, 0.05, 0)
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=0, atol=1e-6)


def test_an_end_of_the_quantile_is_an_outlier_with_all_that_equal_it():
    fitted = artifact(outliers=0.02, sinks=0)
    values = torch.zeros(1, HEADS, 1, DIM)
    values[0, 0, 0, :8] = torch.tensor([9.0, 9.0, 9.0, 1.0, -1.0, -8.0, -8.0, -8.0])
    _, found = simulate(recipe(fitted).layers[0], draw(0)[:, :, :1], values)
    # the places of the quantiles, 0.63 from the ends, lie between two of the nines and two of the eights: all of them
    # are as far out as the quantiles, and the rest spans [-1, 1], whose ends the ladder has
    assert torch.equal(found[0, 0, 0, :8], values[0, 0, 0, :8])
    wanted = slow_values(values[0].numpy(), fitted.values[0].table, 0.02, 0)
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=0, atol=1e-6)


@given(st.integers(1, 60), st.floats(0, 0.49), st.integers(0, 1000))
def test_quantiles(count, tail, seed):
    x = torch.randn(3, count, generator=torch.Generator().manual_seed(seed)).double()
    wanted = np.quantile(x.numpy(), [tail, 1 - tail], axis=-1, keepdims=True)
    for found, want in zip(quantiles(x, tail), wanted, strict=True):
        # a place within 1e-9 of an entry is that entry: the gap to its neighbour, at most some 6, times 1e-9
        np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-8)


def test_a_quantile_on_an_entry_is_that_entry():
    x = torch.randn(4, 201, generator=torch.Generator().manual_seed(0))
    low, high = quantiles(x, 0.005)
    ranked = x.sort(-1).values
    assert torch.equal(low, ranked[:, 1:2]) and torch.equal(high, ranked[:, -2:-1])


def test_other_methods_go_through_their_codec_in_whole_groups():
    plan = parse("kivi:2 sinks=3").layers[0]
    length = 3 + 64 + 5
    keys, values = torch.randn(2, 2, length, 32), torch.randn(2, 2, length, 32)
    found = simulate(plan, keys, values)
    codec = plan.key.codec
    assert torch.equal(found[0][:, :, 3:67], codec.decode(codec.encode(keys[:, :, 3:67])))
    assert torch.equal(found[0][:, :, :3], keys[:, :, :3]) and torch.equal(found[0][:, :, 67:], keys[:, :, 67:])
    codec = plan.value.codec
    assert torch.equal(found[1][:, :, 3:], codec.decode(codec.encode(values[:, :, 3:])))
    assert torch.equal(found[1][:, :, :3], values[:, :, :3])


def test_what_is_too_short_or_exact_stays():
    keys, values = torch.randn(1, 2, 3, 32), torch.randn(1, 2, 3, 32)
    for method in ("exact", "kivi:2 sinks=3"):
        assert all(map(torch.equal, simulate(parse(method).layers[0], keys, values), (keys, values)))


def test_the_type_of_the_model_is_kept():
    keys, values = draw(1, dtype=torch.bfloat16), draw(2, dtype=torch.bfloat16)
    found = simulate(recipe(artifact()).layers[0], keys, values)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in found)


def test_every_layer_has_its_own_plan():
    model, fitted = tiny_llama(), artifact()
    seen = []

    class Watched(Simulated):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            seen.append((layer_idx, key_states, value_states, given))
            return given

    with torch.no_grad():
        model(tokens(1, LENGTH), **cache_argument(Watched(model, recipe(fitted))))
    assert [layer for layer, *_ in seen] == [0, 1]
    for layer, keys, values, found in seen:
        assert all(map(torch.equal, found, simulate(recipe(fitted).layers[layer], keys, values)))
        assert not torch.equal(found[0], keys)


def test_refusals():
    model = tiny_llama()
    cache = Simulated(model, parse("int4"))
    model(tokens(1, 4), **cache_argument(cache))
    with pytest.raises(RuntimeError, match="one pass"):
        model(tokens(1, 4), **cache_argument(cache))
    with pytest.raises(ValueError, match="kvquant needs"):
        Simulated(model, parse("kvquant"))
    with pytest.raises(ValueError, match="made for"):
        Simulated(tiny_llama(layers=3), recipe(artifact()))
