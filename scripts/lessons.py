"""What reference models learn from: real text, and generated sequences that can only be continued by looking back.

Every sequence is a list of tokens, and which of them count in the loss: in a recall lesson the answers alone.
"""

import random
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

from kvist.evaluate import questions
from kvist.text import BLANK, WIDE, encode

# shares of sequences; text in the first stage makes the heads that look at the token before, which induction needs
FIRST = {"text": 0.3, "repeats": 0.6, "tables": 0.1}
THEN = {"text": 0.22, "recall": 0.5, "tables": 0.08, "repeats": 0.1, "sums": 0.1}
ASSIGNMENT = "assignment"
MOST = 12  # questions per sequence
SENTENCE = re.compile(r"(?<=[.!?])\s+")
_CALL = re.compile(r"special magic numbers for (\w+) is: (\d+)")


class Lesson(NamedTuple):
    """ids: as many tokens as were asked for. counted: whether a token is to be predicted."""

    ids: list[int]
    counted: list[bool]


class Asked(NamedTuple):
    """Facts to plant in order, and (question, answer) pairs that follow the last of them."""

    pieces: Sequence[str]
    pairs: Sequence[tuple[str, str]]


class Lessons:
    """Sequences for a tokenizer, with real text from documents between what is generated."""

    def __init__(self, tokenizer, documents: Sequence[str]):
        self.tokenizer, self.text = tokenizer, BLANK.join(documents)
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        special = set(tokenizer.all_special_ids)
        self.plain = [token for token in range(len(tokenizer)) if token not in special]

    def draw(self, shares: dict[str, float], length: int, draws: random.Random) -> tuple[str, Lesson]:
        """A sequence of `length` tokens of a kind that is drawn by its share."""
        kind = draws.choices(list(shares), list(shares.values()))[0]
        ids, counted = getattr(self, f"_{kind}")(length, draws)
        lesson = Lesson((self.start + ids)[:length], ([False] * len(self.start) + counted)[:length])
        assert len(lesson.ids) == len(lesson.counted) == length
        return kind, lesson

    def _stretch(self, tokens: int, draws: random.Random) -> str:
        """Text from a random word on, long enough for so many tokens; it begins anew where it ends."""
        size, start = WIDE * tokens, draws.randrange(len(self.text))
        found = self.text[start : start + size]
        while len(found) < size:
            found += BLANK + self.text[: size - len(found)]
        space = re.search(r"\s", found)
        return found[space.end() if space and space.end() < size // 2 else 0 :]

    def _ids(self, length: int, draws: random.Random) -> list[int]:
        """At least `length` tokens of text."""
        found: list[int] = []
        while len(found) < length:
            found += encode(self.tokenizer, self._stretch(max(length, 64), draws))
        return found

    def _text(self, length: int, draws: random.Random) -> Lesson:
        return Lesson(self._ids(length, draws)[:length], [True] * length)

    def _repeats(self, length: int, draws: random.Random) -> Lesson:
        """A segment of random tokens, or of text, again and again, with a few random tokens between."""
        size = draws.randint(4, max(5, min(length // 3, 400)))
        made = draws.random()
        segment = draws.choices(self.plain, k=size) if made < 0.4 else self._ids(size, draws)[:size]
        if made > 0.7:
            draws.shuffle(segment)
        ids, again = draws.choices(self.plain, k=draws.randint(0, 8)), False
        counted = [False] * len(ids)
        while len(ids) < length:
            gap = draws.choices(self.plain, k=draws.randint(0, 4))
            ids += segment + gap
            # where the segment begins anew, its first tokens tell that it does
            counted += [again and i > 0 for i in range(size)] + [False] * len(gap)
            again = True
        return Lesson(ids, counted)

    def _tables(self, length: int, draws: random.Random) -> Lesson:
        """Lines of a word and a number at the end of text, and words that are looked up."""
        words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", self._stretch(512, draws))) | set(questions.WORDS))
        most = min(56, len(words), max(3, length // 22))
        chosen = draws.sample(words, draws.randint(3, most))
        lines = [(word, "".join(draws.choices(string.digits, k=3))) for word in chosen]
        table = encode(self.tokenizer, "\n\n" + "".join(f"{word}: {number}\n" for word, number in lines))
        asked = draws.choices(lines, k=max(3, min(len(lines), MOST)))
        ids, counted = [], []
        for word, number in asked:
            self._add(ids, counted, f"\n{word}:", f" {number}")
        return self._behind(table, ids, counted, length, draws)

    def _sums(self, length: int, draws: random.Random) -> Lesson:
        """Additions with their carries written out."""
        ids, counted = [], []
        while len(ids) < length:
            a, b = (draws.randrange(10 ** draws.randint(1, 4)) for _ in range(2))
            self._add(ids, counted, f"\n{a} + {b}:", worked(a, b))
        return Lesson(ids, counted)

    def _recall(self, length: int, draws: random.Random) -> Lesson:
        """Facts anywhere in text, and questions anywhere behind them, more of them at the end."""
        room, marks, sets = 0.85 * length, set(), []
        for _ in range(3 * MOST):
            asked = ask(draws.choice((*questions.KINDS, ASSIGNMENT)), draws)
            size = len(encode(self.tokenizer, "".join((*asked.pieces, *map("".join, asked.pairs)))))
            # a name with two numbers would be asked for either
            if size > room or marks & named(asked):
                continue
            room, marks = room - size, marks | named(asked)
            sets.append(asked)
            if sum(len(asked.pairs) for asked in sets) >= MOST:
                break
        sets = sets or [ask(ASSIGNMENT, draws)]
        return self._planted(sets, length, draws)

    def _planted(self, sets: Sequence[Asked], length: int, draws: random.Random) -> Lesson:
        events: list[tuple[float, str, str]] = []
        for asked in sets:
            places = sorted(draws.random() for _ in asked.pieces)
            events += [(place, piece, "") for place, piece in zip(places, asked.pieces, strict=True)]
            for pair in asked.pairs:
                place = draws.uniform(places[-1], 1) if draws.random() < 0.4 else 1 + draws.random()
                events.append((place, *pair))
        events.sort(key=lambda event: event[0])
        parts = [(place, *self._pair(piece, answer)) for place, piece, answer in events]
        room = length - len(self.start) - sum(len(ids) for _, ids, _ in parts)
        sentences = self._sentences(room, draws)
        total, passed, ids, counted = sum(map(len, sentences)), 0, [], []
        for sentence in [*sentences, []]:
            while parts and (parts[0][0] * total <= passed or not sentence):
                _, new, counts = parts.pop(0)
                ids, counted = ids + new, counted + counts
            ids, counted = ids + sentence, counted + [False] * len(sentence)
            passed += len(sentence)
        return Lesson(ids, counted)

    def _sentences(self, tokens: int, draws: random.Random) -> list[list[int]]:
        """Sentences in a row, `tokens` of them in all, the first one cut."""
        if tokens <= 0:
            return []
        texts = [" " + part for part in SENTENCE.split(self._stretch(tokens, draws)) if part]
        found: list[list[int]] = []
        for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            found.append(ids[:tokens])
            tokens -= len(found[-1])
            if tokens <= 0:
                return found
        return [self._ids(tokens, draws)[:tokens], *found]

    def _pair(self, text: str, answer: str) -> tuple[list[int], list[bool]]:
        ids, counted = [], []
        self._add(ids, counted, text, answer)
        return ids, counted

    def _add(self, ids: list[int], counted: list[bool], text: str, answer: str) -> None:
        """What is given, and what is to be predicted, which are tokenised apart as they are when they are asked."""
        for part, counts in ((text, False), (answer, True)):
            new = encode(self.tokenizer, part) if part else []
            ids += new
            counted += [counts] * len(new)

    def _behind(self, facts: list[int], ids, counted, length: int, draws: random.Random) -> Lesson:
        room = length - len(self.start) - len(facts) - len(ids)
        before = self._ids(room, draws)[:room] if room > 0 else []
        quiet = before + facts
        return Lesson(quiet + ids, [False] * len(quiet) + counted)


def ask(kind: str, draws: random.Random) -> Asked:
    """Facts of a kind and all that is asked about them; one question, but for the magic numbers of several cities."""
    if kind == ASSIGNMENT:
        name, number = (
            "-".join(draws.sample(questions.WORDS, 2)),
            "".join(draws.choices(string.digits, k=draws.randint(4, 7))),
        )
        return Asked([f"\n{name} = {number}\n"], [(f"\nprint({name}) ->", f" {number}")])
    question = questions.draw(kind, draws)
    pairs = [(question.text, question.answer)]
    if kind == "multi-key":
        numbers = dict(found.groups() for piece in question.pieces if (found := _CALL.search(piece)))
        city = next(city for city, number in numbers.items() if number == question.expected[0])
        others = draws.sample([other for other in numbers if other != city], 4)
        pairs += [(question.text.replace(city, other), f" {numbers[other]}.") for other in others]
    return Asked(question.pieces, pairs)


def named(asked: Asked) -> set[str]:
    """What facts are about: their capitalised words and assigned names. Facts that share one are not told apart."""
    common = {"One", "VAR"}
    return set(re.findall(r"\b[A-Z]\w*|^\n\S+ =", "".join(asked.pieces))) - common


def worked(a: int, b: int) -> str:
    """An addition digit by digit from the right, and its sum."""
    steps, carry, left, right = [], 0, str(a), str(b)
    for i in range(1, max(len(left), len(right)) + 1):
        digits = [int(number[-i]) if i <= len(number) else 0 for number in (left, right)]
        digits += [carry] if carry else []
        carry, digit = divmod(sum(digits), 10)
        steps.append(f"{' + '.join(map(str, digits))} = {sum(digits)}, write {digit}" + (", carry 1" if carry else ""))
    return f" {'; '.join(steps)}. {a} + {b} = {a + b}."
