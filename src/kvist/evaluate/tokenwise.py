"""Each token of windows of text under several contenders at once: divergence from the exact cache, and likelihood.

A window is a prompt, whose keys and values are exact when attention sees them, and tokens behind it that are scored.
They come in steps of a few tokens, as in decoding, so that history is quantized as it is produced; or, without a step,
in one update, where every query sees what the cache holds in the end. "simulated" quantizes every token but the sinks
within one pass, as published tables are made: no window, no storage. These are different numbers, never mixed.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from transformers import DynamicCache

from kvist.evaluate.contenders import Contender, State, bits, fill, packed
from kvist.evaluate.generation import check_chunks, forward, living, read, states_of, steps, whole
from kvist.evaluate.settings import Mode
from kvist.evaluate.simulate import Simulated
from kvist.models.adapter import Model, describe
from kvist.models.compat import cache_argument
from kvist.plan import Recipe

MODES: tuple[str, ...] = get_args(Mode)
CHUNK = 1 << 19  # logits compared at a time: their fp32 copies fit a core's cache


class Tokens(NamedTuple):
    """Per scored token, (B, T): kl, nats, of the next-token distribution from the exact one; nll, nats, of the token
    that followed; same: whether both put the same token first."""

    kl: Tensor
    nll: Tensor
    same: Tensor


class Scores(NamedTuple):
    """Of one contender: its scores; packed (T,): whether any token was packed when these were scored; bits: allocated
    bits per cached number at the end (in mode "simulated", of a packed token); seconds of the scored forward passes."""

    contender: int
    tokens: Tokens
    packed: Tensor
    bits: float
    seconds: float


class Reference(NamedTuple):
    """Of windows (B, L): ids; mask int64 (B, L), 0 for padding; keys and values of the first `prompt` tokens; exact
    logits (B, T, vocabulary) of the T = L - prompt tokens behind."""

    ids: Tensor
    mask: Tensor
    prompt: int
    states: list[State]
    logits: Tensor


@torch.no_grad()
def exact(model, ids: Tensor, prompt: int = 0, chunk: int = 8192, padding: int = 0) -> Reference:
    """The exact side of windows int64 (B, L): once for all contenders. `padding` slots are put on the left of each
    row; the prompt is read in chunks."""
    check_chunks(model)
    ids = torch.nn.functional.pad(ids, (padding, 0)).to(model.device)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    if prompt == 0 and not padding:
        return Reference(ids, mask, 0, [], model(ids, use_cache=False).logits)
    cache, first = DynamicCache(config=model.config), prompt + padding
    read(model, cache, ids[:, :first], mask[:, :first], chunk)
    states = states_of(cache)
    return Reference(ids, mask, first, states, forward(model, cache, ids[:, first:], mask))


@torch.no_grad()
def score(model, known: Reference, contenders: Sequence[Contender], mode: Mode, step: int | None) -> Iterator[Scores]:
    """Every contender on what is known exactly. ValueError for a mode or a step that does not go with the prompt."""
    if mode not in MODES:
        raise ValueError(f"a mode is {' or '.join(map(repr, MODES))}, found {mode!r}")
    if mode == "simulated" and (known.prompt or step):
        raise ValueError("mode 'simulated' is one pass over whole windows; give it no prompt and no step")
    if known.prompt and not step:
        raise ValueError("tokens behind a prompt come in steps, as in decoding; give a --step")
    for i, contender in enumerate(contenders):
        if contender.floor:
            yield _floor(model, i, contender, known)
        elif mode == "simulated":
            yield _simulated(model, i, contender, known)
        else:
            yield _stored(model, i, contender, known, step)


def _stored(model, i: int, contender: Contender, known: Reference, step: int | None) -> Scores:
    batch, length = known.ids.shape
    parts, behind, began, start = [], [], time.perf_counter(), known.prompt
    # in one update every query reads the whole cache: one decode for all is faster than packed attention
    with living(model, contender, length, "exact" if step else "stored", packed=bool(step)) as cache:
        if known.prompt:
            fill(cache, known.states, whole(known.mask[:, : known.prompt]))
        for logits in steps(model, cache, known.ids, known.mask, known.prompt, step or length):
            parts.append(compared(known, logits, start))
            behind.append(torch.full((parts[-1].kl.shape[1],), packed(cache)))
            start += logits.shape[1]
        size = bits(cache, describe(model), batch)
    return Scores(i, joined(parts), torch.cat(behind), size, time.perf_counter() - began)


def _simulated(model, i: int, contender: Contender, known: Reference) -> Scores:
    if contender.recipe is None:
        raise ValueError(f"mode 'simulated' needs a recipe, and {contender.name} is none")
    began = time.perf_counter()
    logits = model(known.ids, **cache_argument(Simulated(model, contender.recipe))).logits
    tokens = compared(known, logits, 0)
    size = packed_bits(contender.recipe, describe(model))
    return Scores(i, tokens, torch.ones(tokens.kl.shape[1], dtype=torch.bool), size, time.perf_counter() - began)


def _floor(model, i: int, contender: Contender, known: Reference) -> Scores:
    """Nothing quantized: the same windows in another precision, or one row at a time."""
    began, size = time.perf_counter(), 8.0 * model.dtype.itemsize
    twin = contender.twin(model)
    rows = known.ids.split(1) if twin is model else (known.ids,)
    logits = torch.cat([twin(ids, use_cache=False).logits[:, known.prompt :] for ids in rows])
    tokens = compared(known, logits, known.prompt)
    return Scores(i, tokens, torch.zeros(tokens.kl.shape[1], dtype=torch.bool), size, time.perf_counter() - began)


def compared(known: Reference, logits: Tensor, start: int) -> Tokens:
    """Logits (B, n, vocabulary) of tokens start, start + 1, … of the windows against the exact ones. The last token of
    a window has no successor and is not scored. In fp32, summed in fp64."""
    first = start - known.prompt
    count = min(logits.shape[1], known.logits.shape[1] - 1 - first)
    after = known.ids[:, start + 1 : start + 1 + count]
    p, q = known.logits[:, first : first + count], logits[:, :count]
    rows = max(1, CHUNK // (p.shape[-1] * len(p)))
    parts = [tokenwise(after[:, j : j + rows], p[:, j : j + rows], q[:, j : j + rows]) for j in range(0, count, rows)]
    return joined(parts or [tokenwise(after, p, q)])


def tokenwise(after: Tensor, exact: Tensor, logits: Tensor) -> Tokens:
    """Of tokens that followed (B, n) and two logits (B, n, vocabulary) before them."""
    same = exact.argmax(-1) == logits.argmax(-1)
    p, q = exact.float().log_softmax(-1), logits.float().log_softmax(-1)
    nll = -q.gather(-1, after.unsqueeze(-1)).squeeze(-1).double()
    kl = (p - q).mul_(p.exp()).sum(-1).double().clamp_min_(0)
    return Tokens(kl.cpu(), nll.cpu(), same.cpu())


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Scores of consecutive tokens."""
    return Tokens(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def packed_bits(recipe: Recipe, facts: Model) -> float:
    """Bits per element of packed tokens, mean of keys and values, over all layers: pages alone, without windows, sinks
    and tables. What a cache's bits come down to as its length grows."""
    plans, shapes = recipe.for_layers(len(facts.served)), facts.shapes
    nbytes = sum(
        spec.page_bytes(shape.heads, recipe.page)
        for plan, shape in zip(plans, shapes, strict=True)
        for side, dim in zip(plan.sides, (shape.key_dim, shape.value_dim), strict=True)
        for spec in side.codec.layout(shape.heads, dim, shape.stored(plan.packs)).values()
    )
    return 8 * nbytes / (recipe.page * sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes))
