"""What is done to a cache, the same to kvist's and to a reference, on a model of any family.

An operation drives a cache and returns logits. Each is run over transformers' own cache, the reference of `exact`, or
over that with full attention rounded to 8 bits, the reference of `int8`; then over kvist's. The verdict is "equal",
"within" (the budget of rounding), or the sentence with which kvist refuses; anything else is an AssertionError.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from dense import rounded
from models_tiny import tokens
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import kvist
from kvist.evaluate.contenders import contender
from kvist.evaluate.generation import Prompt, forward, generate
from kvist.evaluate.tokenwise import exact, score
from kvist.models.compat import cache_argument

PROMPT, CHUNK, STEPS = 60, 8, 5
METHODS = ("exact", "int8")


class Rounded(DynamicLayer):
    """An update sees its own tokens exact, and earlier ones rounded to 8 bits per token and head."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        stored = super().update(key_states, value_states)
        return (
            tuple(torch.cat([rounded(x[:, :, :before], 8), x[:, :, before:]], 2) for x in stored) if before else stored
        )


def reference(model, method: str, served: list[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    if method == "int8":
        for i in served:
            cache.layers[i] = Rounded()
    return cache


@torch.no_grad()
def said(model, cache, *chunks: Tensor) -> Tensor:
    """Logits (1, T, vocabulary) of chunks (1, n), one forward each."""
    return torch.cat([model(chunk, use_cache=True, **cache_argument(cache)).logits for chunk in chunks], 1)


def steps(seed: int = 4) -> tuple[Tensor, ...]:
    return tokens(1, STEPS, seed).split(1, 1)


class Case(NamedTuple):
    """A model, what makes a new cache for it, and a folder. `ours`: whether that is kvist's."""

    model: nn.Module
    make: Callable
    folder: Path
    ours: bool


def several(case: Case) -> None:
    """Some models take but one token behind a prompt."""
    said(case.model, case.make(), tokens(1, PROMPT), tokens(1, CHUNK, 9))


def saved(case: Case) -> Tensor:
    cache = case.make()
    first = said(case.model, cache, tokens(1, PROMPT), *steps(3))
    if case.ours:
        cache.save(case.folder / "cache.kvist")
        cache = kvist.Cache.load(case.folder / "cache.kvist", case.model)
    return torch.cat([first, said(case.model, cache, *steps())], 1)


def mended(case: Case) -> Tensor:
    cache = case.make()
    first = said(case.model, cache, tokens(1, PROMPT))
    if not case.ours:
        several(case)
    else:
        with interrupted(case.model):
            said(case.model, cache, tokens(1, CHUNK, 9))
        try:
            cache.mend()
        except ValueError:  # then nothing else is done with it until it is reset
            for use in (lambda: said(case.model, cache, *steps()), lambda: cache.save(case.folder / "torn.kvist")):
                refuses(use)
            cache.reset()
            assert torch.equal(said(case.model, cache, tokens(1, PROMPT)), first)
            raise
    return torch.cat([first, said(case.model, cache, *steps())], 1)


def cropped(case: Case) -> Tensor:
    cache = case.make()
    first = said(case.model, cache, tokens(1, PROMPT))
    if not case.ours:
        several(case)
    else:
        ignored = said(case.model, cache, tokens(1, CHUNK, 9))
        try:
            cache.crop(-CHUNK)
        except ValueError:  # then nothing was changed
            other = case.make()
            whole = said(case.model, other, tokens(1, PROMPT), tokens(1, CHUNK, 9), *steps())
            assert torch.equal(torch.cat([first, ignored, said(case.model, cache, *steps())], 1), whole)
            cache.crop(-cache.get_seq_length())  # all of it can always go
            assert torch.equal(said(case.model, cache, tokens(1, PROMPT)), first)
            raise
    return torch.cat([first, said(case.model, cache, *steps())], 1)


def turned(case: Case) -> Tensor:
    turns = (tokens(1, PROMPT), *steps(2), tokens(1, 12, 5), *steps(3), tokens(1, 40, 6), *steps())
    return said(case.model, case.make(), *turns)


@torch.no_grad()
def beamed(case: Case) -> Tensor:
    """The scores that the beams had at each step: equal where all beams were."""
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    ids = tokens(2, PROMPT)
    given = {"attention_mask": torch.ones_like(ids)} | cache_argument(case.make())
    out = case.model.generate(ids, output_scores=True, **given, **options)
    return torch.stack(out.scores, 1).clamp_min(-1e4)


class Words:
    """A tokenizer of numbers."""

    eos_token_id = None

    def decode(self, ids: list[int], **_) -> str:
        return " ".join(map(str, ids))


@torch.no_grad()
def evaluated(model, method: str) -> str:
    """Fidelity and passkey as `kvist eval` asks for them: of `exact` no divergence and the model's own answers."""
    windows, found = tokens(2, PROMPT + 20), contender(method)
    known = exact(model, windows, PROMPT)
    (scores,) = score(model, known, [found], "stored", 4)
    prompts = [Prompt(tuple(row[:PROMPT]), tuple(row[PROMPT : PROMPT + 5]), 4) for row in windows.tolist()]
    (answers,) = generate(model, Words(), [found], prompts)
    assert scores.tokens.kl.isfinite().all() and all(len(text.split()) == 4 for text in answers.texts)
    if method == "int8":
        assert scores.tokens.kl.median() < 1e-2, f"divergence {scores.tokens.kl.median():.1e}"
        return "within"
    assert scores.tokens.kl.max() < 1e-6, f"divergence {scores.tokens.kl.max():.1e}"
    cache, mask, own = DynamicCache(config=model.config), torch.ones_like(windows[:, : PROMPT + 5]), []
    forward(model, cache, windows[:, :PROMPT], mask[:, :PROMPT])
    chunk = windows[:, PROMPT : PROMPT + 5]
    for _ in range(4):
        own.append(chunk := forward(model, cache, chunk, mask, 1).argmax(-1))
        mask = torch.cat([mask, mask[:, :1]], 1)
    own = [Words().decode(row) for row in torch.cat(own, 1).tolist()]
    assert answers.texts == own, f"answers {answers.texts}, the model {own}"
    return "equal"


OPERATIONS: dict[str, Callable[[Case], Tensor]] = {
    "save": saved,
    "mend": mended,
    "crop": cropped,
    "turns": turned,
    "beams": beamed,
}


def verdict(model, operation: str, method: str, folder: Path) -> str:
    """What becomes of an operation: "equal", "within", kvist's sentence, or what transformers' own cache cannot do."""
    try:
        served = kvist.Cache(model, method).inner.describes.served
    except ValueError as error:
        return sentence(error)
    own = [Case(model, lambda name=name: reference(model, name, served), folder, False) for name in (method, "exact")]
    try:
        drive = OPERATIONS[operation if operation != "eval" else "turns"]
        wanted, plain = (drive(case) for case in own)
    except Exception as error:
        return f"transformers' own cache cannot: {type(error).__name__}"
    try:
        if operation == "eval":
            return evaluated(model, method)
        found = drive(Case(model, lambda: kvist.Cache(model, method), folder, True))
    except ValueError as error:
        return sentence(error)
    if method == "exact":
        assert torch.equal(found, wanted), f"differs by {distance(found, wanted).max():.1e} of the spread"
        return "equal"
    error, effect = distance(found, wanted), distance(plain, wanted)
    # a code that tips over, a token that goes to another expert: never more than rounding does at all
    assert error.median() <= max(1e-3, float(effect.median()) / 4), f"differs by {error.median():.1e} of the spread"
    assert error.max() <= max(0.05, 2 * float(effect.max())), f"differs by {error.max():.1e} of the spread"
    return "within"


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Of logits (B, T, vocabulary), relative to their spread, per token."""
    assert found.shape == wanted.shape
    return (found - wanted).abs().amax(-1).flatten() / wanted.std().clamp_min(1e-6)


def sentence(error: ValueError) -> str:
    """A refusal of kvist's in one line; of transformers' or torch's own errors none is taken for one."""
    *_, last = traceback.extract_tb(error.__traceback__)
    assert "kvist" in Path(last.filename).parts, f"no sentence of ours: {error}"
    assert "\n" not in str(error)
    return str(error)


def refuses(use: Callable) -> None:
    try:
        use()
    except ValueError:
        return
    raise AssertionError("a cache that could not be mended went on")


class interrupted:
    """A forward that Ctrl-C stops before the middle one of the model's layers."""

    def __init__(self, model: nn.Module):
        depth = len(kvist.Cache(model, "exact").layers)
        lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == depth]
        linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
        self.modules = [each[depth // 2] for each in lists] or linear[-1:]

    def __enter__(self) -> None:
        def stop(*_):
            raise KeyboardInterrupt

        self.hooks = [module.register_forward_pre_hook(stop) for module in self.modules]

    def __exit__(self, kind, *_) -> bool:
        for hook in self.hooks:
            hook.remove()
        assert kind is KeyboardInterrupt, "the forward was not stopped"
        return True
