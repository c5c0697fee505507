"""What calibration sees, against slow loops over every activation: thresholds, capped rule, weighted histograms."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families.zoo import COMMON, FAMILIES, tiny
from models_tiny import sharpen, tiny_llama, tokens
from transformers import DynamicCache, GlmConfig, GlmForCausalLM

from kvist.artifact import Settings
from kvist.calibrate.passes import BINS
from kvist.calibrate.run import calibrate, observe
from kvist.calibrate.state import State
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.models.rope import pre_rope, tagged

WINDOWS = tokens(3, 25, seed=5)
SHARE = 0.1  # of 32 channels: 3.2, so 4 slots


@cache
def model_of(name: str):
    if name != "partial-yarn":
        return tiny(name, FAMILIES[name][2][0])
    parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "partial_rotary_factor": 0.5}
    options = COMMON | {"head_dim": 16, "max_position_embeddings": 512}
    config = GlmConfig(**options, rope_parameters=parameters | {"original_max_position_embeddings": 64})
    return sharpen(GlmForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32))


class Kept(DynamicCache):
    """Keeps keys before and after RoPE, and values."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        kept = {"post-rope": key_states, "pre-rope": pre_rope(key_states).key, "values": value_states}
        for x in kept.values():
            x.retain_grad()
        self.__dict__.setdefault("given", {})[layer_idx] = kept
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@cache
def activations(name: str) -> dict:
    """By layer and kind: activations and gradients of the loss, fp32 (samples, T, heads, D), all in memory."""
    model, rows = copy.deepcopy(model_of(name)), []
    for window in WINDOWS:
        cache, ids = Kept(config=model.config), window.unsqueeze(0)
        with tagged(model):
            logits = model(input_ids=ids, **cache_argument(cache), use_cache=True).logits[0].float()
        F.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        rows.append(cache.given)
    return {
        (i, kind): tuple(
            torch.stack([t[0].transpose(0, 1) for t in (pick(row[layer][kind]) for row in rows)]).numpy()
            for pick in (lambda x: x.detach(), lambda x: x.grad)
        )
        for i, layer in enumerate(describe(model).served)
        for kind in ("post-rope", "pre-rope", "values")
    }


def flat(name: str, layer: int, kind: str, sinks: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of all samples behind the sinks, channels) and gradients."""
    return tuple(x[:, sinks:].reshape(-1, x.shape[2] * x.shape[3]) for x in activations(name)[layer, kind])


def percentiles(values: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    ends = np.percentile(values.astype(np.float64), [50 * share, 100 - 50 * share], axis=0, method="linear")
    return tuple(ends.astype(np.float16))


def affine(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half range and middle in fp16 arithmetic, from thresholds in fp16 (section 1.5 of the published code)."""
    return tuple(x.astype(np.float32) for x in ((high - low) / np.float16(2), (high + low) / np.float16(2)))


def extreme(row: np.ndarray, slots: int) -> set[int]:
    """The slots/2 lowest and highest entries of a row."""
    order = sorted(range(len(row)), key=lambda c: (row[c], c))
    return set(order[: slots // 2]) | set(order[len(row) - slots // 2 :])


def capped(values: np.ndarray, share: float, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The capped rule, entry by entry: the published intent."""
    scale, middle = affine(*percentiles(values, share))
    low, high = np.full(values.shape[1], np.inf), np.full(values.shape[1], -np.inf)
    for x in values:
        gone = extreme((x - middle) / scale, slots)
        for c in range(len(x)):
            if c not in gone:
                low[c], high[c] = min(low[c], x[c]), max(high[c], x[c])
    return low.astype(np.float16), high.astype(np.float16)


def within(got: tuple[float, ...], wanted: np.ndarray, exact: bool) -> bool:
    """Equal, or within a step of fp16 where the rotation was undone and not avoided."""
    if exact:
        return np.array_equal(np.array(got), wanted.astype(np.float64))
    return np.abs(np.array(got) - wanted.astype(np.float64)).max() <= np.abs(wanted).max() * 2**-10


def run(name: str, settings: Settings, path):
    return observe(model_of(name), WINDOWS, settings, State(path, "key"))


def test_the_text_shows_what_is_tested():
    slots, channels = 4, 32
    assert 2 * math.ceil(SHARE / 2 * channels) == slots
    x, gradient = flat("llama", 1, "pre-rope", 0)
    assert x.shape == (75, channels) and np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("sinks", [0, 1, 5])
@pytest.mark.parametrize("share", [0.0, SHARE])
@pytest.mark.parametrize("keys", ["pre-rope", "post-rope"])
def test_thresholds_are_percentiles_of_all_tokens_behind_the_sinks(keys, share, sinks, tmp_path):
    settings = Settings(bits=3, outliers=share, cap="none", keys=keys, sinks=sinks, sensitivity="none")
    ranges = run("llama", settings, tmp_path).ranges
    for layer, fixed in enumerate(ranges):
        low, high = percentiles(flat("llama", layer, keys, sinks)[0], share)
        assert within(fixed.low, low, keys == "post-rope") and within(fixed.high, high, keys == "post-rope")


@pytest.mark.parametrize("name", ["phi3", "llama-yarn", "partial-yarn", "llama3-rope", "qwen3", "cohere"])
def test_thresholds_of_other_rotary_embeddings(name, tmp_path):
    settings = Settings(bits=3, outliers=0.1, cap="none", sensitivity="none")
    for layer, fixed in enumerate(run(name, settings, tmp_path).ranges):
        low, high = percentiles(flat(name, layer, "pre-rope", 1)[0], 0.1)
        assert within(fixed.low, low, False) and within(fixed.high, high, False)


@pytest.mark.parametrize("keys", ["pre-rope", "post-rope"])
def test_capped_thresholds_are_the_extremes_of_what_stays(keys, tmp_path):
    settings = Settings(bits=3, outliers=SHARE, keys=keys, sinks=2, sensitivity="none")
    for layer, fixed in enumerate(run("llama", settings, tmp_path).ranges):
        values = flat("llama", layer, keys, 2)[0]
        low, high = capped(values, SHARE, 4)
        assert within(fixed.low, low, keys == "post-rope") and within(fixed.high, high, keys == "post-rope")
        assert (values.max(0) > high.astype(np.float32) * 1.001).any()  # something escaped


def normalised(values: np.ndarray, low, high, slots: int, uncapped: bool) -> tuple:
    """u, scale and what stays, entry by entry, of keys per channel."""
    scale, middle = affine(low, high)
    u = (values - middle) / scale
    stays = np.ones(u.shape, bool)
    for t, row in enumerate(u):
        gone = {c for c in range(len(row)) if abs(row[c]) > 1} if uncapped else extreme(row, slots) if slots else set()
        stays[t, list(gone)] = False
    return u, np.broadcast_to(scale, u.shape), stays


def online(values: np.ndarray, slots: int) -> tuple:
    """The same, each token by the least and the greatest of what stays in it."""
    u, scales, stays = (
        np.zeros(values.shape, np.float32),
        np.zeros(values.shape, np.float32),
        np.ones(values.shape, bool),
    )
    for t, row in enumerate(values):
        gone = extreme(row, slots) if slots else set()
        rest = [row[c] for c in range(len(row)) if c not in gone]
        # fp32 ends here: of fixed ranges alone are the thresholds rounded first
        low, high = min(rest), max(rest)
        half, middle = (np.float32(np.float16(x)) for x in ((high - low) / 2, (high + low) / 2))
        u[t], scales[t] = (row - middle) / half, half
        stays[t, list(gone)] = False
    return u, scales, stays


def weights(kind: str, gradient: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return {"fisher-scaled": gradient**2 * scale**2, "fisher": gradient**2, "none": np.ones_like(gradient)}[kind]


def agrees(histogram, u: np.ndarray, w: np.ndarray) -> None:
    """Sums over everything, and the distribution up to a bin that rounding may have crossed."""
    got = histogram.to_tensor().numpy()
    u, w = np.clip(u.astype(np.float64), -1, 1), w.astype(np.float64)
    sums = [u.size, u.sum(), (u * u).sum(), w.sum(), (w * u).sum(), (w * u * u).sum()]
    scales = [u.size, np.abs(u).sum(), (u * u).sum(), w.sum(), (w * np.abs(u)).sum(), (w * u * u).sum()]
    assert got[0].sum() == u.size
    assert np.abs(got.sum(1) - sums).max() <= 1e-3 * np.max(scales)
    assert all(abs(a - b) <= 1e-3 * s for a, b, s in zip(got.sum(1), sums, scales, strict=True))
    index = np.clip(((u + 1) * (BINS / 2)).astype(int), 0, BINS - 1)
    for row, each in ((0, np.ones_like(w)), (3, w)):
        wanted = np.cumsum(np.bincount(index, each, minlength=BINS))
        found, slack = np.cumsum(got[row]), 1e-3 * each.sum()
        reach = 4
        below = np.concatenate([np.zeros(reach), wanted[:-reach]])
        above = np.concatenate([wanted[reach:], np.full(reach, wanted[-1])])
        assert (found >= below - slack).all() and (found <= above + slack).all()


@pytest.mark.parametrize("sensitivity", ["fisher-scaled", "fisher", "none"])
@pytest.mark.parametrize("cap", ["token", "none"])
@pytest.mark.parametrize("keys", ["pre-rope", "post-rope"])
def test_histograms_hold_every_entry_with_its_weight(keys, cap, sensitivity, tmp_path):
    check_histograms("llama", Settings(bits=3, outliers=SHARE, keys=keys, cap=cap, sensitivity=sensitivity), tmp_path)


@pytest.mark.parametrize("name", ["phi3", "llama-yarn", "partial-yarn", "qwen3", "cohere"])
def test_histograms_of_other_families(name, tmp_path):
    """Where RoPE scales (YaRN), gradients before it are larger by that factor, of the channels it turns."""
    check_histograms(name, Settings(bits=3, outliers=SHARE, sinks=0, sensitivity="fisher"), tmp_path)


@pytest.mark.parametrize("sinks", [0, 3])
def test_histograms_without_outliers(sinks, tmp_path):
    check_histograms("llama", Settings(bits=4, outliers=0, sinks=sinks), tmp_path)
    check_histograms("llama", Settings(bits=4, outliers=0, sinks=sinks, cap="none"), tmp_path / "uncapped")


@pytest.mark.parametrize("share", [0.0, SHARE])
def test_keys_per_token_are_normalised_like_values(share, tmp_path):
    settings = Settings(bits=3, outliers=share, key_axis="token")
    found = check_histograms("llama", settings, tmp_path)
    assert found.ranges == [None, None]


def check_histograms(name: str, settings: Settings, path):
    found = run(name, settings, path)
    channels = flat(name, 0, "values", 0)[0].shape[1]
    slots = 2 * math.ceil(settings.outliers / 2 * channels)
    for layer in range(len(found.keys)):
        for kind, histogram in ((settings.keys, found.keys[layer]), ("values", found.values[layer])):
            x, gradient = flat(name, layer, kind, settings.sinks)
            fixed = found.ranges[layer] if kind != "values" else None
            if fixed is None:
                u, scale, stays = online(x, slots)
            else:  # thresholds are tested above: here those that were found
                ends = (np.array(end, np.float16) for end in (fixed.low, fixed.high))
                u, scale, stays = normalised(x, *ends, slots, settings.cap == "none" and settings.outliers > 0)
            agrees(histogram, u[stays], weights(settings.sensitivity, gradient, scale)[stays])
    return found


def test_slots_of_uncapped_keys_hold_those_of_nearly_every_token(tmp_path):
    settings = Settings(bits=3, outliers=0.2, cap="none", keys="post-rope", sensitivity="none")
    found, needs = run("llama", settings, tmp_path), []
    for layer, fixed in enumerate(found.ranges):
        scale, middle = affine(*(np.array(end, np.float16) for end in (fixed.low, fixed.high)))
        u = (flat("llama", layer, "post-rope", 1)[0] - middle) / scale
        needs += [sum(abs(v) > 1 for v in row) for row in u]
    enough = sorted(needs)[math.ceil(0.999 * len(needs)) - 1]
    assert found.settings.slots == enough + enough % 2 > 2


def test_slots_are_no_more_than_a_byte_counts(tmp_path):
    found = run("llama", Settings(bits=3, outliers=SHARE, cap="none", sensitivity="none"), tmp_path)
    assert found.settings.slots >= 2
    from kvist.calibrate.passes import Passes

    state = State(tmp_path, "other")
    passes = Passes(tiny_llama(), WINDOWS, found.settings, None, 2, state, lambda *done: None)
    state.tensors["needs"] = torch.bincount(torch.full((2000,), 300), minlength=1025)
    assert passes._slots() == 254
    state.tensors["needs"] = torch.bincount(torch.tensor([0] * 999 + [40]), minlength=65)
    assert passes._slots() == 2  # one token in a thousand may lack some
    state.tensors["needs"] = torch.bincount(torch.tensor([0] * 998 + [39, 40]), minlength=65)
    assert passes._slots() == 40


def test_a_channel_that_always_escapes_keeps_its_percentiles(tmp_path):
    """A constant that fp16 cannot hold lies beyond its range, a point, in every token."""
    model, channel = copy.deepcopy(tiny_llama()), 7

    def constant(module, args, out):
        out = out.clone()
        out[..., channel] = 20007.0  # fp16 has 20000 and 20016
        return out

    model.model.layers[0].self_attn.k_proj.register_forward_hook(constant)
    settings = Settings(bits=3, outliers=0.03, sensitivity="none", sinks=0)
    ranges = observe(model, WINDOWS, settings, State(tmp_path, "pre")).ranges
    assert ranges[0].low[channel] == pytest.approx(20000, abs=20) == ranges[0].high[channel]


@pytest.mark.parametrize(
    ("bits", "qnorm", "on"), [(2, "auto", True), (3, "auto", False), (4, "on", True), (2, "off", False)]
)
def test_q_norm(bits, qnorm, on, tmp_path):
    """Where it is on, what is read has the mean and the deviation of what was stored."""
    settings = Settings(bits=bits, outliers=SHARE, sensitivity="none")
    model = model_of("llama")
    found = calibrate(model, WINDOWS, settings, source="", digest="", seed=0, folder=tmp_path / "out", qnorm=qnorm)
    assert found.settings.qnorm is on
    for layer, fit in enumerate(found.values):
        assert (fit.table.read is not None) is on
        if on:
            u, _, stays = online(flat("llama", layer, "values", 1)[0], 4)
            u = u[stays]
            points, read = np.array(fit.table.points), np.array(fit.table.read)
            back = read[np.abs(u[:, None] - points).argmin(1)]
            assert back.mean() == pytest.approx(u.mean(), abs=5e-3) and back.std() == pytest.approx(u.std(), rel=1e-2)


def test_fitted_points_beat_even_ones_on_what_they_were_fitted_to(tmp_path):
    """Weighted error in units of the loss: the reason for all of this."""
    errors = {}
    for levels in ("nuq", "int"):
        settings = Settings(bits=3, levels=levels, outliers=SHARE)
        found = calibrate(model_of("llama"), WINDOWS, settings, source="", digest="", seed=0, folder=tmp_path / levels)
        x, gradient = flat("llama", 0, "values", 1)
        u, scale, stays = online(x, 4)
        points = np.array(found.values[0].table.points)
        rounded = points[np.abs(u[..., None] - points).argmin(-1)]
        errors[levels] = ((gradient * scale * (u - rounded))[stays] ** 2).sum()
    assert errors["nuq"] < 0.9 * errors["int"]
