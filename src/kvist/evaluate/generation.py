"""Greedy answers from a cache that was given a prompt: the same prompts for all contenders, the prompt read once.

Under prefill "exact" a prompt attends to itself in full precision, so that its keys and values do not depend on the
contender: they are computed once, and each cache is given them in one update, as a prompt would. The question that
follows is a second update, and sees what is stored. Under prefill "stored" each contender reads the prompt itself, in
chunks.
"""

import copy
import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import DynamicLayer

from kvist.attention import attach
from kvist.cache.cache import Cache
from kvist.evaluate.contenders import Contender, State, bits, fill
from kvist.evaluate.settings import Prefill
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "cross_attention", "dummy"}
_FORGETS: WeakKeyDictionary = WeakKeyDictionary()


class Prompt(NamedTuple):
    """Token ids: context, read first, not empty; question, read from what is stored of it, not empty. most: new
    tokens; stops: what ends an answer, and is no part of it."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    most: int
    stops: tuple[str, ...] = ()


class Answers(NamedTuple):
    """Of one contender: bits per cached number after the prompt, seconds after it was read, a text per prompt."""

    contender: int
    bits: float
    seconds: float
    texts: list[str]


class Read(NamedTuple):
    """A batch of prompts on the left of its tensors: ids and mask int64 (B, T); what every layer holds where
    they are the same for all contenders."""

    ids: Tensor
    mask: Tensor
    states: list[State] | None


@torch.no_grad()
def generate(
    model,
    tokenizer,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    prefill: Prefill = "exact",
    chunk: int = 8192,
) -> Iterator[Answers]:
    """The greedy answers of each contender to a batch of prompts. Prompts of unequal lengths are padded on the left.
    A context longer than `chunk` is read in chunks."""
    check_chunks(model)
    ids, mask = _padded([prompt.context for prompt in prompts], model.device)
    states = None
    if prefill == "exact":
        cache = DynamicCache(config=model.config)
        read(model, cache, ids, mask, chunk)
        states = states_of(cache)
    for i, contender in enumerate(contenders):
        yield _answers(model, tokenizer, i, contender, prompts, Read(ids, mask, states), prefill, chunk)


def states_of(cache: DynamicCache) -> list[State]:
    """What each layer holds: keys and values (B, H, T, D) of full attention; a copy of a layer of another kind."""
    full = [type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers]
    pairs = zip(full, cache.layers, strict=True)
    return [(layer.keys, layer.values) if whole else copy.deepcopy(layer) for whole, layer in pairs]


def read(model, cache: TransformersCache, ids: Tensor, mask: Tensor, chunk: int, keep: int = 1) -> Tensor:
    """Logits (B, keep, vocabulary) of the last tokens of `ids` (B, T), read in chunks behind what the cache holds;
    mask (B, past + T). `keep` is at most a chunk."""
    past, logits = mask.shape[1] - ids.shape[1], None
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        end = past + start + part.shape[1]
        logits = forward(model, cache, part, mask[:, :end], min(keep, part.shape[1]))
    assert logits is not None
    return logits


def forward(model, cache: TransformersCache, ids: Tensor, mask: Tensor, keep: int = 0) -> Tensor:
    """Logits of the last `keep` tokens, all for 0. Positions count the tokens of a row, not its padding."""
    given: dict = {"attention_mask": whole(mask), "position_ids": (mask.cumsum(1) - 1)[:, -ids.shape[1] :].clamp_min(0)}
    takes = inspect.signature(model.forward).parameters
    if "position_ids" not in takes and given["attention_mask"] is None:
        del given["position_ids"]  # its own are the same
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = keep
    return model(ids, use_cache=True, **cache_argument(cache), **given).logits[:, -keep:]


@torch.no_grad()
def check_chunks(model) -> None:
    """ValueError for a model with recurrent layers of which transformers forgets the state when several tokens come
    behind a prompt: what is measured in steps would say nothing of a cache. Asked once of a model."""
    facts = describe(model)
    if _FORGETS.get(model) is None:
        ids = (
            torch.arange(1, 25, device=model.device)
            .remainder(model.config.get_text_config(decoder=True).vocab_size)
            .unsqueeze(0)
        )
        mask, logits = torch.ones_like(ids), []
        for step in (12, 1) if set(facts.kinds) - ATTENTION else ():
            cache = DynamicCache(config=model.config)
            read(model, cache, ids[:, :12], mask[:, :12], 12)
            logits.append(torch.cat(list(steps(model, cache, ids, mask, 12, step)), dim=1).float())
        _FORGETS[model] = float((logits[0] - logits[1]).abs().mean() / logits[1].std()) if logits else 0.0
    if _FORGETS[model] > 0.1:
        raise ValueError(
            f"transformers computes tokens of {facts.name} that come together behind a prompt otherwise than one by "
            f"one (logits differ by {_FORGETS[model]:.0%} of their spread), so that nothing measured in steps would "
            "say anything of a cache; kvist does not evaluate this model"
        )


@contextmanager
def living(
    model, contender: Contender, room: int, prefill: Prefill = "exact", packed: bool = True
) -> Iterator[TransformersCache]:
    """An empty cache of a contender, with room for so many tokens per row; `packed`: attention reads packed pages."""
    cache = contender.cache(model, room, prefill)
    try:
        with attach(model) if packed and contender.recipe else nullcontext():
            yield cache
    finally:
        if isinstance(cache, Cache):
            cache.close()


def steps(model, cache: TransformersCache, ids: Tensor, mask: Tensor, start: int, step: int) -> Iterator[Tensor]:
    """Logits (B, n, vocabulary) of tokens `start`, … of `ids` (B, T), `step` of them in each forward; mask (B, T)."""
    for first in range(start, ids.shape[1], step):
        last = min(first + step, ids.shape[1])
        yield forward(model, cache, ids[:, first:last], mask[:, :last])


def _answers(model, tokenizer, i: int, contender: Contender, prompts, read_: Read, prefill: Prefill, chunk: int):
    room = read_.ids.shape[1] + max(len(p.question) + p.most for p in prompts)
    with living(model, contender, room, prefill) as cache:
        if read_.states is None:
            read(model, cache, read_.ids, read_.mask, chunk)
        else:
            fill(cache, read_.states, whole(read_.mask))
        size = bits(cache, describe(model), len(prompts))
        began = time.perf_counter()
        texts = _decode(model, tokenizer, cache, read_.mask, prompts)
    return Answers(i, size, time.perf_counter() - began, texts)


def whole(mask: Tensor) -> Tensor | None:
    """A mask, or None where nothing is masked."""
    return None if bool(mask.all()) else mask


def _decode(model, tokenizer, cache: TransformersCache, mask: Tensor, prompts: Sequence[Prompt]) -> list[str]:
    asked, seen = _padded([prompt.question for prompt in prompts], model.device)
    mask = torch.cat([mask, seen], dim=1)
    token = forward(model, cache, asked, mask, 1).argmax(-1)
    written: list[list[int]] = [[] for _ in prompts]
    texts: list[str | None] = [None] * len(prompts)
    last = ends(model, tokenizer)
    for _ in range(max(prompt.most for prompt in prompts)):
        for row, (prompt, new) in enumerate(zip(prompts, token[:, 0].tolist(), strict=True)):
            if texts[row] is not None:
                continue
            if new not in last:
                written[row].append(new)
            text = tokenizer.decode(written[row], skip_special_tokens=True)
            cut = min((text.find(stop) for stop in prompt.stops if stop in text), default=None)
            if cut is not None or new in last or len(written[row]) >= prompt.most:
                texts[row] = text if cut is None else text[:cut]
        if all(text is not None for text in texts):
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = forward(model, cache, token, mask, 1).argmax(-1)
    return [text or "" for text in texts]


def ends(model, tokenizer) -> set[int]:
    """Tokens that end a text, by the model's generation settings and its tokenizer."""
    found = getattr(model.generation_config, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _padded(sequences: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """Sequences of unequal lengths side by side, padding on the left, and which of it are tokens: int64 (B, T) each."""
    width = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :], mask[row, width - len(sequence) :] = torch.tensor(sequence), 1
    return ids.to(device), mask.to(device)
