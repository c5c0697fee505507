"""What each method makes of the documents: bytes, fidelity to the model's own cache, facts found, an answer, speed.

A document's keys and values are computed once, by the model with transformers' own cache: under prefill="exact" they do
not depend on the method, since a prompt attends to itself in full precision. Each method's cache is given them in one
update, as a prompt would. What follows sees what is stored: the document's last tokens, in steps, for the divergence;
all questions about it, a row each; and the open question, answered greedily, the methods taking turns, so that a
busy machine slows all of them alike.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from kvist.attention import attach
from kvist.baselines import held
from kvist.cache.cache import Cache
from kvist.demo.documents import Document
from kvist.evaluate.contenders import cut, fill
from kvist.evaluate.generation import ends, forward, states_of, steps
from kvist.evaluate.tokenwise import Reference, Tokens, compared, joined
from kvist.models.adapter import describe
from kvist.plan import Recipe

STEP = 32  # tokens at a time of those scored: what one update holds stays exact within it
ROWS = 6  # questions side by side: an exact cache is copied for each
ANSWER = 40  # tokens of an answer
TURN = 5  # of them at a time
ROOM = 64  # tokens for question and answer
BILLED = (8192, 32768)  # tokens
BASELINE = "DynamicCache"  # transformers' own

Method = tuple[str, Recipe | None]  # a name, and its recipe; none is the baseline
States = list[tuple[Tensor, Tensor]]
Tick = Callable[[str, int, int], None]  # a stage, steps done, steps in all


@dataclass
class Result:
    """One row of the table. Bytes and bits are means over the documents, with all of a document stored: `used_bits`
    hold tokens, `bits_per_element` and `nbytes` are allocated. `billed`: bits per element by the bill, by tokens."""

    method: str
    sentence: str
    recipe: dict
    used_bits: float = 0.0
    bits_per_element: float = 0.0
    nbytes: float = 0.0
    billed: dict[str, float] = field(default_factory=dict)
    kl: float = 0.0
    agreement: float = 0.0
    right: int = 0
    asked: int = 0
    tokens_per_second: float = 0.0
    answer: str = ""


class Read(NamedTuple):
    """A document, read once: keys and values of all of it, per layer, and what is known exactly of its last tokens."""

    document: Document
    states: States
    exact: Reference


def measure(
    model,
    tokenizer,
    documents: list[Document],
    methods: list[Method],
    tick: Tick = lambda stage, done, total: None,
) -> list[Result]:
    """A result per method. The answer is to the first document's open question."""
    results = [
        Result(name, str(recipe or name), recipe.model_dump(mode="json") if recipe else {}) for name, recipe in methods
    ]
    scores: list[list[Tokens]] = [[] for _ in methods]
    with torch.inference_mode():
        for n, document in enumerate(documents):
            tick("documents read", n, len(documents))
            known = read(model, document)
            tick("documents read", n + 1, len(documents))
            for i, (result, (_, recipe)) in enumerate(zip(results, methods, strict=True)):
                _stored(model, result, known, recipe, len(documents))
                scores[i].append(_scored(model, known, recipe))
                _ask(model, result, known, recipe)
                tick("documents × methods", n * len(methods) + i + 1, len(documents) * len(methods))
            if n == 0:
                _talk(model, tokenizer, results, known, methods, tick)
    for result, found in zip(results, scores, strict=True):
        every = joined(found)
        result.kl, result.agreement = every.kl.mean().item(), every.same.double().mean().item()
    return results


def read(model, document: Document) -> Read:
    """The document by the model with transformers' own cache."""
    ids = torch.tensor([document.ids])
    mask, first = torch.ones_like(ids), ids.shape[1] - document.scored
    cache = DynamicCache(config=model.config)
    forward(model, cache, ids[:, :first], mask[:, :first], 1)
    logits = forward(model, cache, ids[:, first:], mask)
    states = states_of(cache)
    return Read(document, states, Reference(ids, mask, first, cut(states, first), logits))


@contextmanager
def filled(model, recipe: Recipe | None, states: States) -> Iterator[Cache | DynamicCache]:
    """A cache that was given a document, with room for what follows."""
    if recipe is None:
        cache = DynamicCache(config=model.config)
        fill(cache, states, None)
        yield cache
        return
    cache = Cache(model, recipe, reserve=states[0][0].shape[2] + ROOM)
    try:
        fill(cache, states, None)
        yield cache
    finally:
        cache.close()


def _reading(model, recipe: Recipe | None) -> AbstractContextManager:
    """Attention reads packed pages meanwhile; that of the baseline is the model's own."""
    return attach(model) if recipe else nullcontext()


def _stored(model, result: Result, known: Read, recipe: Recipe | None, documents: int) -> None:
    """Bytes and bits, from the tensors; and the bill at other lengths."""
    numbers = sum(keys.numel() + values.numel() for keys, values in known.states)
    with filled(model, recipe, known.states) as cache:
        report = cache.report() if isinstance(cache, Cache) else None
        allocated = report.nbytes if report else held(cache)
        used = sum(report.used.values()) if report else allocated
    result.nbytes += allocated / documents
    result.bits_per_element += 8 * allocated / numbers / documents
    result.used_bits += 8 * used / numbers / documents
    facts, own = describe(model), 8.0 * model.dtype.itemsize
    for tokens in BILLED:
        result.billed[str(tokens)] = recipe.bits_per_element(facts.shape, len(facts.served), tokens) if recipe else own


def _scored(model, known: Read, recipe: Recipe | None) -> Tokens:
    """The document's last tokens, each seeing what is stored of those before its step."""
    exact, parts, start = known.exact, [], known.exact.prompt
    with filled(model, recipe, exact.states) as cache, _reading(model, recipe):
        for logits in steps(model, cache, exact.ids, exact.mask, start, STEP):
            parts.append(compared(exact, logits, start))
            start += logits.shape[1]
    return joined(parts)


def _ask(model, result: Result, known: Read, recipe: Recipe | None) -> None:
    """A fact is found if each token of the answer is the first choice after those before it, as if decoded greedily."""
    every = known.document.questions
    for questions in (every[i : i + ROWS] for i in range(0, len(every), ROWS)):
        with filled(model, recipe, known.states) as cache, _reading(model, recipe):
            logits = answers(model, cache, len(known.document.ids), questions)
        for question, row in zip(questions, logits, strict=True):
            result.right += row.argmax(-1).tolist() == list(question.answer_ids)
            result.asked += 1


def answers(model, cache, past: int, questions) -> list[Tensor]:
    """Logits (answer tokens, vocabulary) per question, behind `past` tokens: the question in one update, its answer,
    given, in the next. Rows share the document's full pages."""
    asked, seen = _padded([q.ids for q in questions], left=True)
    given, told = _padded([q.answer_ids[:-1] for q in questions], left=False)
    mask = torch.cat([torch.ones(len(questions), past, dtype=torch.long), seen, told], dim=1)
    cache.batch_repeat_interleave(len(questions))
    logits = forward(model, cache, asked, mask[:, : past + asked.shape[1]], 1)
    if given.shape[1]:
        logits = torch.cat([logits, forward(model, cache, given, mask)], dim=1)
    return [row[: len(q.answer_ids)] for row, q in zip(logits.float(), questions, strict=True)]


def _padded(sequences: list[tuple[int, ...]], left: bool) -> tuple[Tensor, Tensor]:
    """Sequences of unequal lengths side by side, and which of it are tokens, 0 or 1."""
    width = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        at = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, at], mask[row, at] = torch.tensor(sequence), 1
    return ids, mask


@dataclass
class _Talk:
    """One method's answer in the making: the token that comes next, those written, seconds of each step."""

    cache: Cache | DynamicCache
    recipe: Recipe | None
    token: Tensor
    past: int
    written: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def go_on(self, model, steps: int) -> None:
        with _reading(model, self.recipe):
            for _ in range(steps):
                self.written.append(int(self.token))
                self.past, start = self.past + 1, time.perf_counter()
                self.token = _next(model, self.cache, self.token, self.past)
                self.seconds.append(time.perf_counter() - start)


def _talk(model, tokenizer, results: list[Result], known: Read, methods: list[Method], tick: Tick) -> None:
    """The open question, answered greedily by all methods, a few tokens at a time; the median of the steps is the
    speed. What comes behind the end of an answer is timed and not shown."""
    asked, talks = torch.tensor([known.document.open.ids]), []
    past = len(known.document.ids) + asked.shape[1]
    with ExitStack() as stack:
        for _, recipe in methods:
            cache = stack.enter_context(filled(model, recipe, known.states))
            with _reading(model, recipe):
                talks.append(_Talk(cache, recipe, _next(model, cache, asked, past), past))
        for done in range(0, ANSWER, TURN):
            for talk in talks:
                talk.go_on(model, TURN)
            tick("tokens of each answer", done + TURN, ANSWER)
    last = ends(model, tokenizer)
    for result, talk in zip(results, talks, strict=True):
        length = next((i for i, token in enumerate(talk.written) if token in last), ANSWER)
        result.answer = tokenizer.decode(talk.written[:length], skip_special_tokens=True).strip()
        result.tokens_per_second = 1 / sorted(talk.seconds)[len(talk.seconds) // 2]


def _next(model, cache, ids: Tensor, past: int) -> Tensor:
    """The first choice behind `ids`, int64 (1, 1); `past` tokens are known then."""
    return forward(model, cache, ids, torch.ones(1, past, dtype=torch.long), 1)[:, -1:].argmax(-1)
