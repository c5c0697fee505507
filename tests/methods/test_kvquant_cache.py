"""KVQuant in a living cache: what its pages hold, and for which positions."""

import copy

import numpy as np
import pytest
import torch
from models_tiny import padded, tiny_llama, tokens
from torch import Tensor
from transformers import DynamicCache

import kvist
from kvist.artifact import Artifact, Settings
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.calibrate.run import calibrate
from kvist.coding import Codec, Identity
from kvist.methods.kvquant import recipe
from kvist.models.compat import cache_argument
from kvist.models.rope import pre_rope, tagged
from kvist.types import HOLD

SHARE = 0.05  # of 64 channels: 3.2, so 4 slots


def there_and_back(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> dict[str, Artifact]:
    kinds = {
        "capped": Settings(bits=4, outliers=SHARE, sinks=2),
        "uncapped": Settings(bits=4, outliers=0.2, cap="none", sinks=2),
        "post-rope": Settings(bits=4, outliers=SHARE, sinks=2, keys="post-rope"),
        "per-token": Settings(bits=4, outliers=SHARE, sinks=2, key_axis="token"),
    }
    return {
        name: calibrate(
            tiny_llama(),
            tokens(2, 48, seed=9),
            settings.model_copy(update={"sensitivity": "none"}),
            source="",
            digest="",
            seed=0,
            folder=tmp_path_factory.mktemp(name),
        )
        for name, settings in kinds.items()
    }


class Watched(kvist.Cache):
    """Keeps what each layer's update was given, keys before RoPE among it."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        tag = pre_rope(key_states)
        given = self.__dict__.setdefault("given", {}).setdefault(layer_idx, [])
        given.append((key_states, None if tag is None else tag.key, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def all(self, layer: int) -> tuple[Tensor, ...]:
        """Everything given to a layer: keys, keys before RoPE, values (B, H, slots, D)."""
        return tuple(torch.cat(parts, 2) for parts in zip(*self.given[layer], strict=True))


def packed(cache: kvist.Cache, layer: int, row: int, side: int) -> Tensor:
    """The packed tokens of a row, decoded but not rotated, (H, n, D)."""
    layer = cache.inner.ours[layer]
    layer.settle()
    track = layer.tracks[side]
    frontier = track.states[row].frontier
    assert frontier > 0
    still = track.codec.model_copy(update={"transform": Identity()})
    return still.decode(track.pool.entries(row, list(range(frontier)), 1))


def near(found: Tensor, codec: Codec, before: Tensor) -> None:
    """What is stored is what the codec, without its rotary, makes of keys before RoPE, but for a few codes."""
    wanted = there_and_back(codec.model_copy(update={"transform": Identity()}), before)
    same = (found - wanted).abs() < 2e-3 * before.abs().max()
    assert found.shape == wanted.shape and same.float().mean() > 0.99


@torch.no_grad()
def fed(model, cache, chunks: list[dict]):
    out = None
    with tagged(model):
        for chunk in chunks:
            out = model(**chunk, **cache_argument(cache), use_cache=True)
    return out


def stored_before_rope(cache: Watched, columns: list[list[int]]) -> None:
    """columns: of each row, the slots that are tokens."""
    for i, layer in enumerate(cache.inner.ours):
        _, before, values = cache.all(i)
        for row, slots in enumerate(columns):
            found = packed(cache, i, row, 0)
            behind = slots[layer.plan.sinks :][: found.shape[1]]
            near(found, layer.key.codec, before[row][:, behind])
            near(packed(cache, i, row, 1), layer.value.codec, values[row][:, behind])


@pytest.mark.parametrize("kind", ["capped", "uncapped", "per-token"])
def test_pages_hold_keys_before_rope(kind, fitted):
    cache = Watched(tiny_llama(), recipe(fitted[kind]))
    fed(tiny_llama(), cache, [{"input_ids": tokens(2, 70)}, {"input_ids": tokens(2, 1)}, {"input_ids": tokens(2, 40)}])
    stored_before_rope(cache, [list(range(111))] * 2)


def test_pages_hold_rotated_keys_where_asked(fitted):
    cache = Watched(tiny_llama(), recipe(fitted["post-rope"]))
    fed(tiny_llama(), cache, [{"input_ids": tokens(1, 70)}, {"input_ids": tokens(1, 40)}])
    for i, layer in enumerate(cache.inner.ours):
        near(packed(cache, i, 0, 0), layer.key.codec, cache.all(i)[0][0, :, 2:110])


@pytest.mark.parametrize("recent", [0, 24])
def test_sinks_and_the_recent_window_are_exact(recent, fitted):
    plan, rows = recipe(fitted["capped"], recent=recent), Rows()
    layer = Layer(plan.layers[0], plan.page, plan.prefill, 0, rows)
    x, length = torch.randn(2, 1, 2, 150, 32, generator=torch.Generator().manual_seed(0)), 0
    for count in (100, 1, 1, 40, 1):
        rows.extend(1, count, None)
        layer.update(*x[:, :, :, length : length + count])
        length += count
    layer.settle()
    for side, track in enumerate(layer.tracks):
        assert torch.equal(track.exact.sinks, x[side, :, :, :2])
        assert track.frontiers == [length - 2 - recent]
        if recent:
            window = track.fetch(0, range(length - 2 - recent, length - 2), layer.maps[0])
            assert torch.equal(window, x[side, 0, :, length - recent : length])
        old = track.fetch(0, range(length - 2 - recent), layer.maps[0])
        error = (old - x[side, 0, :, 2 : length - recent]).abs()
        assert error.max() > 0


def test_clipped_entries_are_in_the_report(fitted):
    """As many as a slow count over the keys that were packed says."""
    artifact = fitted["uncapped"]
    artifact = artifact.model_copy(update={"settings": artifact.settings.model_copy(update={"slots": 4})})
    cache = Watched(tiny_llama(), recipe(artifact))
    fed(tiny_llama(), cache, [{"input_ids": tokens(1, 120)}, {"input_ids": tokens(1, 40)}])
    wanted = values = 0
    for i, layer in enumerate(cache.inner.ours):
        layer.settle()
        scale, middle = (x.squeeze(-2).numpy() for x in layer.key.codec._fixed(2, torch.device("cpu")))
        before = cache.all(i)[1][0, :, 2 : 2 + layer.key.frontiers[0]].numpy()
        beyond = np.abs((before - middle[:, None]) / scale[:, None]) > 1
        wanted += np.maximum(beyond.sum((0, 2)) - 4, 0).sum()
        values += int(layer.value.clipped)
    report = cache.report()
    assert wanted > 10 and report.clipped == pytest.approx(wanted, abs=3) and values == 0
    assert "beyond their fixed range" in str(report)


LENGTHS = [70, 103]


def test_left_padding_in_generate_counts_tokens(fitted):
    model, batch = tiny_llama(), padded(LENGTHS)
    cache = Watched(model, recipe(fitted["capped"]))
    with tagged(model):
        model.generate(**batch, **cache_argument(cache), max_new_tokens=40, do_sample=False)
    slots = 103 + 39
    for row, length in enumerate(LENGTHS):
        assert cache.inner.rows.positions(row, torch.arange(length + 39)).tolist() == list(range(length + 39))
    stored_before_rope(cache, [list(range(103 - length, slots)) for length in LENGTHS])


def test_left_padding_in_a_plain_forward_counts_slots(fitted):
    model, batch = tiny_llama(), padded(LENGTHS)
    cache = Watched(model, recipe(fitted["capped"]))
    longer = torch.cat([batch["attention_mask"], torch.ones(2, 40, dtype=torch.long)], 1)
    fed(model, cache, [batch, {"input_ids": tokens(2, 40), "attention_mask": longer}])
    for row, length in enumerate(LENGTHS):
        assert cache.inner.rows.positions(row, torch.tensor([0, 5])).tolist() == [103 - length, 108 - length]
    stored_before_rope(cache, [list(range(103 - length, 143)) for length in LENGTHS])


JUMPS = torch.cat([torch.arange(40), torch.arange(45) + 300, torch.tensor([900, 7, 7]), torch.arange(32) + 50])


def as_stored(cache: Watched, model) -> DynamicCache:
    """An ordinary cache of what a kvist cache holds, made by the reference codec from keys before RoPE, rotated by the
    model's own function."""
    plain = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.inner.ours):
        keys, before, values = cache.all(i)
        frontier, sinks = layer.key.frontiers[0], layer.plan.sinks
        part = slice(sinks, sinks + frontier)
        codec = layer.key.codec.model_copy(update={"transform": Identity()})
        position = cache.where[None, part]
        cos, sin = model.model.rotary_emb(before, position)
        key = codec.decode(codec._reference(before[:, :, part]))
        half = torch.cat([-key[..., 16:], key[..., :16]], -1)
        keys, values = keys.clone(), values.clone()
        keys[:, :, part] = key * cos.unsqueeze(1) + half * sin.unsqueeze(1)
        values[:, :, part] = there_and_back(layer.value.codec, values[:, :, part])
        plain.update(keys, values, i)
    return plain


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", ["capped", "uncapped"])
def test_positions_that_jump(kind, attached, fitted):
    """Prompt and steps at positions of the caller's: attention over what is stored, as a dense computation has it."""
    model = copy.deepcopy(tiny_llama())
    cache = Watched(model, recipe(fitted[kind]))
    if attached:
        kvist.attach(model)
    ids, where = tokens(1, len(JUMPS)), JUMPS.unsqueeze(0)
    cut = [(0, 100), (100, 101), (101, 120)]
    fed(model, cache, [{"input_ids": ids[:, a:b], "position_ids": where[:, a:b]} for a, b in cut])
    cache.where = JUMPS
    assert cache.inner.rows.positions(0, torch.arange(len(JUMPS))).tolist() == JUMPS.tolist()
    assert cache.inner.rows.shift(0) is None
    stored_before_rope(cache, [list(range(len(JUMPS)))])
    assert cache.inner.ours[0].key.frontiers == [118]
    step = {"input_ids": tokens(1, 3, seed=4), "position_ids": torch.tensor([[1000, 1001, 500]])}
    wanted = fed(tiny_llama(), as_stored(cache, tiny_llama()), [step]).logits
    found = fed(model, cache, [step]).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_jumps_survive_crop_save_and_beams(fitted, tmp_path):
    model = tiny_llama()
    cache = Watched(model, recipe(fitted["capped"]))
    ids, where = tokens(2, len(JUMPS)), torch.stack([JUMPS, JUMPS.flip(0)])
    fed(model, cache, [{"input_ids": ids[:, :100], "position_ids": where[:, :100]}])
    cache.crop(-12)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    order = [1, 0, 1]
    ids, where = ids[order], where[order]
    fed(model, cache, [{"input_ids": ids[:, 88:], "position_ids": where[:, 88:]}])
    path = tmp_path / "cache"
    cache.save(path)
    loaded = kvist.Cache.load(path, model)
    for living in (cache, loaded):
        for row in range(3):
            assert living.inner.rows.positions(row, torch.arange(120)).tolist() == where[row].tolist()
    step = {"input_ids": tokens(3, 1), "position_ids": torch.full((3, 1), 2000)}
    wanted, found = (fed(model, living, [step]).logits for living in (cache, loaded))
    assert torch.allclose(wanted, found, atol=1e-5)


def test_a_chunk_within_the_hold_needs_no_positions_yet(fitted):
    """Keys that wait exact are packed later, for the positions that they came with."""
    model, cache = tiny_llama(), Watched(tiny_llama(), recipe(fitted["capped"]))
    where = (torch.arange(90) * 3).unsqueeze(0)
    ids = tokens(1, 90)
    fed(model, cache, [{"input_ids": ids[:, [t]], "position_ids": where[:, [t]]} for t in range(90)])
    stored_before_rope(cache, [list(range(90))])
    assert HOLD < 90


def test_positions_that_cannot_serve_are_refused(fitted):
    model, cache = tiny_llama(), kvist.Cache(tiny_llama(), recipe(fitted["capped"]))
    ids = tokens(1, 40)
    for wrong in (torch.arange(40).view(1, 1, 40).expand(3, 1, 40), torch.arange(40), torch.arange(39).unsqueeze(0)):
        with pytest.raises(ValueError, match=r"position ids of shape \(batch, tokens\)"):
            model(ids, position_ids=wrong, **cache_argument(cache))
    with pytest.raises(ValueError, match="positions being seen"):
        cache.update(*torch.randn(2, 1, 2, 40, 32), 0)
    with torch.no_grad():
        assert model(ids, **cache_argument(cache)).logits.isfinite().all()


def test_keys_after_rope_take_any_positions(fitted):
    model = tiny_llama()
    with torch.no_grad():
        cache = kvist.Cache(model, recipe(fitted["post-rope"]))
        model.model(tokens(1, 40), position_ids=torch.arange(40).unsqueeze(0) * 5, **cache_argument(cache))
        cache = kvist.Cache(model, recipe(fitted["post-rope"]))
        model(tokens(1, 40), position_ids=JUMPS[None, :40], **cache_argument(cache))
    assert cache.get_seq_length() == 40
