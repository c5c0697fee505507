"""What each method makes of the documents: fidelity to the exact cache, answers right, bytes, speed.

A document's keys and values are computed once, by the model with transformers' own cache: under prefill="exact" they do
not depend on the method, since a prompt attends to itself in full precision. Each method's cache is given them in one
update, as a prompt would, and then serves all questions about the document: `batch_repeat_interleave` shares its full
pages, and each row goes on with a question of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from kvist.attention import attach
from kvist.cache.cache import Cache
from kvist.demo.documents import Document
from kvist.evaluate.contenders import fill
from kvist.evaluate.generation import forward, states_of
from kvist.models.compat import cache_argument
from kvist.plan import Recipe

SPEED_TOKENS = 5  # decoded one by one after each document, for the speed
ROOM = 64  # tokens for question and answer


@dataclass
class Result:
    """One row of the table. Bytes and bits are means over the documents, with all of the document stored."""

    method: str
    sentence: str
    recipe: dict
    bits_per_element: float = 0.0
    nbytes: float = 0.0
    kl: float = 0.0
    right: int = 0
    asked: int = 0
    right_by_kind: dict[str, int] = field(default_factory=dict)
    asked_by_kind: dict[str, int] = field(default_factory=dict)
    tokens_per_second: float = 0.0


def measure(
    model, documents: list[Document], methods: list[tuple[str, Recipe]], tick: Callable[[], None] = lambda: None
) -> list[Result]:
    """A result per method; the first of `methods` is the reference. `tick` is called after each document and method."""
    results = [Result(name, str(recipe), recipe.model_dump(mode="json")) for name, recipe in methods]
    steps: list[list[float]] = [[] for _ in methods]
    divergences: list[list[float]] = [[] for _ in methods]
    with torch.inference_mode(), attach(model):
        for document in documents:
            prompt = _prompt(model, document)
            reference = None
            for i, (_, recipe) in enumerate(methods):
                steps[i] += _speed(model, _filled(model, recipe, document, prompt), document.ids[-1])
                cache = _filled(model, recipe, document, prompt)
                report = cache.report()
                results[i].nbytes += report.nbytes / len(documents)
                results[i].bits_per_element += report.bits_per_element / len(documents)
                logits = _answers(model, cache, document)
                reference = logits if reference is None else reference
                for p, q in zip(reference, logits, strict=True):
                    divergences[i] += _kl(p, q)
                _score(results[i], document, logits)
                tick()
    for result, seconds, kls in zip(results, steps, divergences, strict=True):
        result.kl = sum(kls) / len(kls)
        result.tokens_per_second = 1 / sorted(seconds)[len(seconds) // 2]
    return results


def _prompt(model, document: Document) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a document, per layer, as the model computes them."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([document.ids]), **cache_argument(cache), logits_to_keep=1)
    return states_of(cache)


def _filled(model, recipe: Recipe, document: Document, prompt: list[tuple[Tensor, Tensor]]) -> Cache:
    cache = Cache(model, recipe, reserve=len(document.ids) + ROOM)
    fill(cache, prompt, None)
    return cache


def _answers(model, cache: Cache, document: Document) -> list[Tensor]:
    """Logits (answer tokens, vocabulary) per question: the question in one update, its answer, given, in the next."""
    past, questions = len(document.ids), document.questions
    asked, seen = _padded([q.ids for q in questions], left=True)
    given, told = _padded([q.answer_ids[:-1] for q in questions], left=False)
    mask = torch.cat([torch.ones(len(questions), past, dtype=torch.long), seen, told], dim=1)
    cache.batch_repeat_interleave(len(questions))
    first = forward(model, cache, asked, mask[:, : past + asked.shape[1]], 1)
    logits = torch.cat([first, forward(model, cache, given, mask)], dim=1).float()
    return [row[: len(q.answer_ids)] for row, q in zip(logits, questions, strict=True)]


def _padded(sequences: list[tuple[int, ...]], left: bool) -> tuple[Tensor, Tensor]:
    """Sequences of unequal lengths side by side, and which of it are tokens, 0 or 1."""
    width = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        at = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, at], mask[row, at] = torch.tensor(sequence), 1
    return ids, mask


def _speed(model, cache: Cache, last: int) -> list[float]:
    """Seconds of each of some steps of greedy decoding, one row, after token `last`."""
    seconds, token = [], torch.tensor([[last]])
    for _ in range(SPEED_TOKENS):
        start = time.perf_counter()
        token = model(token, **cache_argument(cache)).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return seconds


def _kl(reference: Tensor, logits: Tensor) -> list[float]:
    """KL divergence in nats of each position's next-token distribution from the reference's."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).tolist()


def _score(result: Result, document: Document, logits: list[Tensor]) -> None:
    """An answer is right if each of its tokens is the first choice after those before it, as greedy decoding goes."""
    for question, row in zip(document.questions, logits, strict=True):
        right = row.argmax(-1).tolist() == list(question.answer_ids)
        result.right, result.asked = result.right + right, result.asked + 1
        result.right_by_kind[question.kind] = result.right_by_kind.get(question.kind, 0) + right
        result.asked_by_kind[question.kind] = result.asked_by_kind.get(question.kind, 0) + 1
