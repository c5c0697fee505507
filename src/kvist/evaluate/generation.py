"""Greedy answers from a cache that was given a prompt: the same prompts for all contenders, the prompt read once.

Under prefill "exact" a prompt attends to itself in full precision, so that its keys and values do not depend on the
contender: they are computed once, and each cache is given them in one update, as a prompt would. The question that
follows is a second update, and sees what is stored. Under prefill "stored" each contender reads the prompt itself, in
chunks.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache as TransformersCache

from kvist.attention import attach
from kvist.cache.cache import Cache
from kvist.evaluate.contenders import Contender, bits, fill
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument

Prefill = Literal["exact", "stored"]


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
    """A batch of prompts on the left of its tensors: ids and mask int64 (B, T); keys and values of all layers where
    they are the same for all contenders."""

    ids: Tensor
    mask: Tensor
    states: list[tuple[Tensor, Tensor]] | None


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
    ids, mask = _padded([prompt.context for prompt in prompts], model.device)
    states = None
    if prefill == "exact":
        cache = DynamicCache(config=model.config)
        read(model, cache, ids, mask, chunk)
        states = states_of(cache)
    for i, contender in enumerate(contenders):
        yield _answers(model, tokenizer, i, contender, prompts, Read(ids, mask, states), prefill, chunk)


def states_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B, H, T, D) per layer."""
    return [(torch.as_tensor(keys), torch.as_tensor(values)) for keys, values, *_ in cache]


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
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :].clamp_min(0)
    out = model(ids, **cache_argument(cache), attention_mask=whole(mask), position_ids=positions, logits_to_keep=keep)
    return out.logits


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
        size = bits(cache, describe(model).shape, len(prompts))
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
    ends = _ends(model, tokenizer)
    for _ in range(max(prompt.most for prompt in prompts)):
        for row, (prompt, new) in enumerate(zip(prompts, token[:, 0].tolist(), strict=True)):
            if texts[row] is not None:
                continue
            if new not in ends:
                written[row].append(new)
            text = tokenizer.decode(written[row], skip_special_tokens=True)
            cut = min((text.find(stop) for stop in prompt.stops if stop in text), default=None)
            if cut is not None or new in ends or len(written[row]) >= prompt.most:
                texts[row] = text if cut is None else text[:cut]
        if all(text is not None for text in texts):
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = forward(model, cache, token, mask, 1).argmax(-1)
    return [text or "" for text in texts]


def _ends(model, tokenizer) -> set[int]:
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
