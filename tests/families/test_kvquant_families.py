"""KVQuant in every family: keys before that family's own rotary embedding, against a dense reference."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers
from dense_kvquant import SETTINGS, fit, fitted, reference
from models_tiny import padded, sharpen, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from zoo import CASES, COMMON, FAMILIES, tiny

import kvist
from kvist.cache.handle import Handle
from kvist.cache.view import View
from kvist.methods.kvquant import recipe
from kvist.models.compat import cache_argument
from kvist.models.rope import tagged

PROMPT, STEPS = 90, 10
MAIN = "nuq3-1%"
# one of each kind of rotation, of attention and of layers
SOME = ["llama3-rope", "llama-yarn", "phi3", "cohere", "gemma3", "gpt-oss", "falcon-multi-query"]
SOME_CASES = [(family, attention) for family, attention in CASES if family in SOME]
OTHERS = [name for name in SETTINGS if name != MAIN]
MATRIX = [(*case, MAIN) for case in CASES] + [(*case, setting) for case in SOME_CASES for setting in OTHERS]

attached = pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])


def plan(family: str, attention: str, setting: str = MAIN):
    return recipe(fitted(family, attention, setting), SETTINGS[setting].recent)


def dense(family: str, attention: str, setting: str = MAIN) -> DynamicCache:
    return reference(tiny(family, attention), fitted(family, attention, setting), SETTINGS[setting].recent)


def reading(model, on: bool):
    return kvist.attach(model) if on else nullcontext()


@torch.no_grad()
def logits_of(model, cache, chunks) -> Tensor:
    """Logits (B, T, V) of the tokens of all chunks, one forward per chunk."""
    with tagged(model):
        return torch.cat([model(chunk, **cache_argument(cache)).logits for chunk in chunks], 1)


def sequence(prompt: int = PROMPT) -> list[Tensor]:
    """A prompt, a chunk, single tokens, a chunk longer than what waits for a crop."""
    ids = tokens(1, PROMPT + 60 + STEPS)
    ids = torch.cat([ids[:, :prompt], ids[:, PROMPT:]], 1)
    return [ids[:, :prompt], *ids[:, prompt:].split([5, *[1] * STEPS, 45, 5, 1, 1, 1, 1, 1], 1)]


@cache
def expected(family: str, attention: str, setting: str, prompt: int = PROMPT) -> Tensor:
    return logits_of(tiny(family, attention), dense(family, attention, setting), sequence(prompt))


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal up to fp32 rounding, relative to the spread of the logits (B, T, V). Undoing a rotation rounds, too, and
    may move a code by one: hence a median, and a bound on the worst."""
    error = (found - wanted).abs().amax(-1) / wanted.std()
    assert error.median() <= 5e-4
    assert error.max() <= 0.05


def read_packed(family: str, attention: str, attached: bool) -> bool:
    """Falcon calls sdpa itself, which the handles answer, attached or not."""
    return attention == "sdpa" if family.startswith("falcon") else attached


@attached
@pytest.mark.parametrize(("family", "attention", "setting"), MATRIX)
def test_steps(family, attention, setting, attached, monkeypatch):
    model, wanted = tiny(family, attention), expected(family, attention, setting)
    exact = logits_of(model, DynamicCache(config=model.config), sequence())
    effect = (wanted - exact)[:, PROMPT:].abs().amax(-1) / exact.std()
    assert effect.median() > 0.02, "what is rounded must show, or this test could not fail"
    with reading(model, attached):
        if read_packed(family, attention, attached):
            monkeypatch.setattr(View, "dense", None)
        cache = kvist.Cache(model, plan(family, attention, setting))
        same(logits_of(model, cache, sequence()), wanted)
    assert cache.recipe.rotary == ("post" not in setting)
    assert cache.report().packed >= PROMPT


LENGTHS = (80, 43)


@attached
@pytest.mark.parametrize(("family", "attention"), SOME_CASES)
def test_generate_of_left_padded_rows(family, attention, attached):
    """Each row says what the dense reference says of it alone, where its positions count from 0."""
    model, batch = tiny(family, attention), padded(LENGTHS)
    cache = kvist.Cache(model, plan(family, attention))
    with reading(model, attached):
        out = model.generate(
            **batch,
            **cache_argument(cache),
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row, length in enumerate(LENGTHS):
        assert cache.inner.rows.shift(row) == 0 and cache.inner.rows.runs[row][0].slot == max(LENGTHS) - length
        said = out.sequences[row : row + 1, max(LENGTHS) - length : -1]
        chunks = [said[:, :length], *said[:, length:].split(1, 1)]
        wanted = logits_of(model, dense(family, attention), chunks)[:, length - 1 :]
        same(torch.stack(out.logits, 1)[row : row + 1], wanted)


@attached
@pytest.mark.parametrize(("family", "attention"), SOME_CASES)
def test_guesses_that_are_taken_back_leave_no_trace(family, attention, attached):
    model, chunks = tiny(family, attention), sequence()
    chunks, guesses = [chunks[0], *torch.cat(chunks[1:], 1)[:, :12].split(1, 1)], tokens(1, 5, seed=9)
    wanted = torch.cat(
        [x[:, -1:] for x in logits_of(model, dense(family, attention), chunks).split([90] + [1] * 12, 1)], 1
    )
    cache, found = kvist.Cache(model, plan(family, attention)), []
    cache.activate_past_recording()
    with reading(model, attached):
        for i, chunk in enumerate(chunks):
            wrong = i % 5
            logits = logits_of(model, cache, [torch.cat([chunk, guesses[:, :wrong]], 1)])
            found.append(logits[:, chunk.shape[1] - 1 : chunk.shape[1]])
            cache.crop(-wrong)
    same(torch.cat(found, 1), wanted)


@attached
@pytest.mark.parametrize(("family", "attention"), [c for c in SOME_CASES if c[0] not in ("gemma3", "gpt-oss")])
def test_crop_into_what_is_packed(family, attention, attached):
    """A prompt cut back deeply goes on as a prompt that was shorter (sliding layers cannot be cut so far)."""
    model, kept = tiny(family, attention), 50
    cache = kvist.Cache(model, plan(family, attention))
    with reading(model, attached):
        first = logits_of(model, cache, sequence()[:1])[:, :kept]
        cache.crop(kept - PROMPT)
        assert cache.inner.ours[0].key.frontiers == [kept - 1]
        found = logits_of(model, cache, sequence(kept)[1:])
    same(torch.cat([first, found], 1), expected(family, attention, MAIN, kept))


def somewhere(jumping: bool) -> tuple[Tensor, Tensor]:
    """A mask (2, 120) with padding in the second row, and position ids that differ from slots and from tokens."""
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, :23] = 0
    where = torch.stack([torch.arange(120) + 500, (torch.arange(120) - 16).clamp_min(0)])
    if jumping:
        where[:, 60:] += 200
    return mask, where


@torch.no_grad()
def fed(model, cache, cuts: list[int], jumping: bool) -> Tensor:
    """Logits of two rows, whose forwards end at `cuts`."""
    ids, out = tokens(2, 120), []
    mask, where = somewhere(jumping)
    with tagged(model):
        for start in range(len(cuts) - 1):
            part, given = slice(*cuts[start : start + 2]), {"attention_mask": mask[:, : cuts[start + 1]]}
            out.append(model(ids[:, part], position_ids=where[:, part], **cache_argument(cache), **given).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("jumping", [False, True])
@pytest.mark.parametrize(("family", "attention"), SOME_CASES)
@pytest.mark.parametrize("setting", [MAIN, "nuq2 recent"])
def test_saved_and_resumed(family, attention, setting, jumping, tmp_path):
    model, cuts = tiny(family, attention), [0, 100, 101, 102, 110, 111]
    with kvist.attach(model):
        straight = fed(model, kvist.Cache(model, plan(family, attention, setting)), cuts, jumping)
        cache = kvist.Cache(model, plan(family, attention, setting))
        first = fed(model, cache, cuts[:3], jumping)
        cache.save(tmp_path / "cache")
        cache.close()
        resumed = kvist.Cache.load(tmp_path / "cache", model, plan(family, attention, setting))
        rest = fed(model, resumed, cuts[2:], jumping)
    assert torch.equal(torch.cat([first, rest], 1), straight)


class Watched(kvist.Cache):
    """Gives each layer's keys and values to the reference as well, and keeps what either hands out."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.seen[layer_idx] = given, self.wanted.layers[layer_idx].update(key_states, value_states)
        return given


def nearly(found: Tensor, wanted: Tensor, tokens: Tensor) -> None:
    """Equal within rounding at tokens (B, T), but for a code in thousands that rounding moved by one."""
    off = ((found - wanted).abs() > 1e-4 * wanted.abs().max()).transpose(1, 2)[tokens]
    assert off.float().mean() <= 1e-3


@pytest.mark.parametrize("jumping", [False, True])
@pytest.mark.parametrize(("family", "attention"), [(name, kinds[0]) for name, (_, _, kinds) in FAMILIES.items()])
def test_keys_that_attention_reads(family, attention, jumping, monkeypatch):
    """They are keys before RoPE, rounded, then rotated by the model: both decoded and in attention over the pages,
    at positions that are neither slots nor the numbers of tokens."""
    model, tiles = tiny(family, attention), []
    cache = Watched(model, plan(family, attention))
    cache.seen, cache.wanted = {}, dense(family, attention)
    for layer in cache.inner.describes.served:
        cache.wanted.layers[layer].starts = torch.tensor([0, 23])
    fed(model, cache, [0, 100, 101, 104], jumping)
    own, mask = View._packed_tiles, somewhere(jumping)[0][:, :104].bool()
    packed, exact = mask.clone(), mask.clone()
    packed[0, 0] = packed[1, 23] = packed[:, 101:] = False
    exact &= ~packed
    for layer in cache.inner.describes.served:
        handles, wanted = cache.seen[layer]
        assert isinstance(handles[0], Handle)
        for handle, want in zip(handles, wanted, strict=True):
            found = handle.dense()
            nearly(found, want, packed)
            assert torch.equal(found.transpose(1, 2)[exact], want.transpose(1, 2)[exact])
            raw = handle.source.store.key if handle.side == 0 else handle.source.store.value
            assert raw.frontiers == [100, 77]
        monkeypatch.setattr(View, "_packed_tiles", lambda *args: tiles.append(1) or own(*args))
        query = torch.randn(2, cache.inner.describes.query_heads, 3, want.shape[-1])
        out = handles[0].source.attend(query, 0.3)
        seen = mask[:, None, None] & torch.ones(3, 104, dtype=torch.bool).tril(101)
        truth = F.scaled_dot_product_attention(query, *wanted, attn_mask=seen, scale=0.3, enable_gqa=True)
        error = (out - truth).abs().amax((1, 3)) / truth.std()
        assert error.median() <= 1e-4 and error.max() <= 0.05
        monkeypatch.undo()
    interleaved = cache.recipe.layers[0].key.codec.transform.style == "interleaved"
    assert bool(tiles) == (jumping or interleaved), "pages at consecutive positions are read by the compiled loops"
    assert interleaved == (family == "cohere")


def other(name: str, **changes):
    """A tiny model outside the zoo."""
    common = {key: value for key, value in COMMON.items() if name == "Llama" or key != "num_key_value_heads"}
    config = getattr(transformers, f"{name}Config")(**common | changes)
    torch.manual_seed(0)
    return sharpen(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def rope(kind: str, theta: float = 10000.0, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


UNSUITED = {
    "gpt2 has no rotary": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "dynamic RoPE depend": ("Llama", rope("dynamic", factor=2.0)),
    "longrope RoPE depend": (
        "Llama",
        rope(
            "longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=64, factor=2.0
        ),
    ),
}


@pytest.mark.parametrize("words", UNSUITED)
def test_models_whose_rotation_cannot_be_undone_store_keys_after_it(words):
    model, setting = other(UNSUITED[words][0], **UNSUITED[words][1]), SETTINGS["nuq3-1% post-rope"].settings
    with pytest.raises(ValueError, match=f"does not fit: .*{words}.*keys=post-rope"):
        kvist.Cache(model, anonymous("llama", "sdpa"))
    artifact = fit(model, setting)
    wanted = logits_of(model, reference(model, artifact), sequence())
    with kvist.attach(model):
        same(logits_of(model, kvist.Cache(model, recipe(artifact)), sequence()), wanted)


def anonymous(family: str, attention: str):
    """A recipe that says nothing of the model that it was fitted to, but for its rotary embedding."""
    return plan(family, attention).model_copy(update={"model": None})


ROPES = ["llama", "llama3-rope", "llama-yarn", "llama-linear", "cohere"]


@pytest.mark.parametrize("mine", ROPES)
@pytest.mark.parametrize("yours", ROPES)
def test_what_was_fitted_under_another_rotary_embedding_is_refused(mine, yours):
    model = tiny(yours, "sdpa")
    if mine == yours:
        assert kvist.Cache(model, anonymous(mine, "sdpa")).recipe.rotary
        return
    with pytest.raises(ValueError, match=r"does not fit: the model's rotary embedding differs; calibrate"):
        kvist.Cache(model, anonymous(mine, "sdpa"))
    with pytest.raises(ValueError, match=r"does not fit: it was made for .*calibrate"):
        kvist.Cache(model, plan(mine, "sdpa"))


@pytest.mark.parametrize(
    "changes",
    [rope("default", 5e5), rope("yarn", factor=8.0, original_max_position_embeddings=64)],
    ids=["theta", "factor"],
)
def test_another_base_or_factor_is_refused(changes):
    """YaRN's factor is not in the hash of the config: the frequencies tell."""
    mine = "llama-yarn" if "factor" in changes["rope_parameters"] else "llama"
    for fitted_recipe in (plan(mine, "sdpa"), anonymous(mine, "sdpa")):
        with pytest.raises(ValueError, match=r"does not fit: .*calibrate"):
            kvist.Cache(other("Llama", **changes), fitted_recipe)
