"""Questions about facts planted in long texts, at every length and depth: passkey, needle, and RULER's harder forms."""

import bisect
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from kvist.evaluate import questions
from kvist.evaluate.contenders import Contender
from kvist.evaluate.generation import Prompt, generate
from kvist.evaluate.measures import Maps, Section
from kvist.evaluate.questions import Question
from kvist.evaluate.registry import Source, task
from kvist.evaluate.settings import Asked, FromText, Planted, Prefill
from kvist.evaluate.task import Measured
from kvist.text import BLANK, WIDE, digest, encode

DEEP = ("passkey", "needle")
ROOM = 128  # tokens for a question and its answer
SLACK = 4  # tokens that an answer may take beyond the true one
# KIVI's passkey: noise around the number, not a text
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?\n]+\s*|$)")


@dataclass(frozen=True)
class Haystack:
    """Documents to hide facts in, and the name they are known by. `digest`: their hash."""

    documents: tuple[str, ...]
    source: str

    @classmethod
    def noise(cls) -> "Haystack":
        return cls((NOISE * 8,), "noise")

    @cached_property
    def text(self) -> str:
        return BLANK.join(self.documents)

    @cached_property
    def digest(self) -> str:
        return digest(self.documents)

    def sentences(self, tokenizer, tokens: int, draws: random.Random) -> list[list[int]]:
        """Sentences in a row from a place drawn at random, as token ids: `tokens` of them in all, the last one cut.
        The text begins anew where it ends."""
        found: list[list[int]] = []
        start, size = draws.randrange(len(self.text)), WIDE * tokens
        stretch = self.text[start : start + size]
        while len(stretch) < size:
            stretch += " " + self.text[: size - len(stretch)]
        for match in SENTENCE.finditer(stretch):
            if not match[0].strip() or (not found and start and match.start() == 0):
                continue  # a stretch begins within a sentence
            ids = encode(tokenizer, " " + match[0].strip())[:tokens]
            found.append(ids)
            tokens -= len(ids)
            if tokens <= 0:
                return found
        raise ValueError(f"the text {self.source!r} is too sparse to hide facts in; give another --data")


class Item(NamedTuple):
    """A question and its prompt; length: tokens of the context; depth: share of the context before the fact that is
    asked, None where several facts are spread over it."""

    question: Question
    prompt: Prompt
    length: int
    depth: float | None


@dataclass(frozen=True)
class Recall:
    """A question per sample, length (tokens of the context) and depth; several facts are spread at random, and depth
    does not count. Everything follows from `seed`."""

    kind: str
    tokenizer: Any
    haystack: Haystack
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    seed: int = 0
    prefill: Prefill = "exact"
    chunk: int = 8192
    batch: int = 8
    metric = 1
    recipes_only = False

    @property
    def name(self) -> str:
        return self.kind

    @property
    def deep(self) -> bool:
        """Whether one fact is asked for, at a depth."""
        return self.kind in DEEP

    @property
    def settings(self) -> dict[str, Any]:
        depths = list(self.depths) if self.deep else []
        own = {"lengths": list(self.lengths), "depths": depths, "samples": self.samples, "seed": self.seed}
        return {"source": self.haystack.source, "data": self.haystack.digest, "prefill": self.prefill, **own}

    @property
    def grid(self) -> list[tuple[int, float | None]]:
        return [(length, depth) for length in self.lengths for depth in (self.depths if self.deep else (None,))]

    @property
    def count(self) -> int:
        return len(self.grid) * self.samples

    def kin(self, item: int) -> int:
        """Contexts of a length go together, so that nothing is padded and bits are those of that length."""
        return self.grid[item // self.samples][0]

    def item(self, number: int) -> Item:
        """The same whatever else is asked."""
        length, depth = self.grid[number // self.samples]
        draws = random.Random(f"{self.kind} {self.seed} {length} {depth} {number % self.samples}")
        return plant(self.tokenizer, questions.draw(self.kind, draws), self.haystack, length, depth, draws)

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        chosen = [self.item(number) for number in items]
        prompts = [item.prompt for item in chosen]
        for found in generate(model, self.tokenizer, contenders, prompts, self.prefill, self.chunk):
            values = {
                "prediction": found.texts,
                "expected": [list(item.question.expected) for item in chosen],
                "length": [item.length for item in chosen],
                "depth": [item.depth for item in chosen],
            }
            yield Measured(found.contender, found.bits, found.seconds, rescored(self.settings, values))


def rescored(settings: dict, values: dict[str, list]) -> dict[str, list]:
    """The values with scores of their predictions: the share of what is expected that stands in them."""
    pairs = zip(values["expected"], values["prediction"], strict=True)
    return values | {"score": [questions.score(expected, text) for expected, text in pairs]}


def plant(tokenizer, question: Question, haystack: Haystack, length: int, depth: float | None, draws: random.Random):
    """The question's facts between sentences of the haystack, `length` tokens in all, at a depth from 0 (the start)
    to 1 (the end), or anywhere. ValueError where the facts alone are longer."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces = [encode(tokenizer, piece) for piece in question.pieces]
    room = length - len(start) - sum(map(len, pieces))
    if room <= 0:
        least = length - room + 1
        raise ValueError(f"{question.kind} needs contexts of at least {least} tokens, found {length}")
    sentences = haystack.sentences(tokenizer, room, draws)
    ends = [0]
    for sentence in sentences:
        ends.append(ends[-1] + len(sentence))
    if depth is None:
        places = sorted(draws.randrange(len(ends)) for _ in pieces)
    else:
        places = [_nearest(ends, depth * ends[-1])] * len(pieces)
    context = list(start)
    for i in range(len(ends)):
        for piece, place in zip(pieces, places, strict=True):
            context += piece if place == i else []
        context += sentences[i] if i < len(sentences) else []
    answer = len(encode(tokenizer, question.answer))
    prompt = Prompt(tuple(context), tuple(encode(tokenizer, question.text)), answer + SLACK, (".\n", ". ", "\n"))
    return Item(question, prompt, length, depth)


def _nearest(ends: list[int], wanted: float) -> int:
    after = bisect.bisect_left(ends, wanted)
    return min((i for i in (after - 1, after) if 0 <= i < len(ends)), key=lambda i: abs(ends[i] - wanted))


@dataclass(frozen=True)
class Options(Asked, Planted):
    """lengths: by default quarters of what the model knows."""


@dataclass(frozen=True)
class TextOptions(Options, FromText):
    """The same, hidden in a text."""


def recall(kind: str, options: Options, source: Source) -> list[Recall]:
    """A task of one kind of question. Lengths leave room for the question and its answer."""
    room, most = source.longest - ROOM, options.samples
    lengths = options.lengths or tuple(room * part // 4 for part in (1, 2, 3, 4))
    text = isinstance(options, TextOptions)
    hay = Haystack(tuple(source.documents), options.data) if text else Haystack.noise()
    depths = tuple(round(i / max(1, options.depths - 1), 4) for i in range(options.depths))
    samples = most if kind in DEEP else most * len(depths)
    if too_long := [length for length in lengths if length > room]:
        raise ValueError(
            f"the model knows {source.longest} positions; contexts have at most {room}, found {too_long[0]}"
        )
    given = (source.tokenizer, hay, lengths, depths, samples)
    return [Recall(kind, *given, options.seed, options.prefill, options.chunk, options.batch)]


for _kind, _words in questions.WORDING.items():
    task(
        _kind,
        _words,
        options=Options if _kind == "passkey" else TextOptions,
        section=Section("maps", "Finding a fact", "Maps of right answers, the best above."),
        figures=(Maps(),),
        rescored=rescored,
    )(partial(recall, _kind))
