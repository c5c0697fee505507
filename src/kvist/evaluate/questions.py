"""Facts planted in a long text, and questions about them: passkey, needles, and RULER's harder forms.

passkey: KIVI's form (one number, said twice). needle: KVQuant's and LWM's haystack, a magic number for a city. The
others follow RULER (arXiv 2404.06654): several keys, of which one is asked; several values of one key; several keys
asked at once; chains of variables; counting. Wording is short and fixed, so that small models can be trained on it.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# fmt: off
CITIES = (
    "Paris", "Oslo", "Lima", "Kyoto", "Boston", "Cairo", "London", "Rome", "Madrid", "Berlin", "Vienna", "Athens",
    "Lisbon", "Dublin", "Warsaw", "Prague", "Geneva", "Moscow", "Delhi", "Tokyo", "Sydney", "Chicago", "Denver",
    "Havana", "Quito", "Bogota", "Nairobi", "Tunis", "Beirut", "Milan", "Naples", "Seville",
)
WORDS = (
    "stone", "window", "river", "garden", "silver", "market", "candle", "forest", "bridge", "winter", "summer",
    "letter", "bottle", "basket", "copper", "village", "mountain", "orange", "ladder", "pencil", "island", "mirror",
    "pocket", "needle", "harbor", "saddle", "feather", "kitchen", "shadow", "thunder", "velvet", "wagon",
)
# fmt: on
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """pieces: texts to plant, in order; text: what is asked at the end; answer: how it goes on; expected: what must
    stand in an answer, each counted alone."""

    kind: str
    pieces: tuple[str, ...]
    text: str
    answer: str
    expected: tuple[str, ...]


def draw(kind: str, draws: random.Random) -> Question:
    """A question of a kind, one of `KINDS`. ValueError for another."""
    if kind not in KINDS:
        raise ValueError(f"a kind of question is one of {', '.join(KINDS)}, found {kind!r}")
    pieces, text, answer, expected = _DRAWN[kind](draws)
    return Question(kind, tuple(pieces), text, answer, tuple(expected))


def score(expected: Sequence[str], prediction: str) -> float:
    """The share of expected strings that stand in a prediction as whole words (RULER's measure)."""
    found = [re.search(rf"(?<!\w){re.escape(each)}(?!\w)", prediction) is not None for each in expected]
    return sum(found) / len(found)


def _number(draws: random.Random) -> str:
    return "".join(draws.choices("0123456789", k=draws.randint(4, 7)))


def _numbers(draws: random.Random, count: int) -> list[str]:
    """Different numbers, none of them part of another."""
    found: list[str] = []
    while len(found) < count:
        number = _number(draws)
        if not any(number in other or other in number for other in found):
            found.append(number)
    return found


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _planted(city: str, number: str) -> str:
    return f" One of the special magic numbers for {city} is: {number}.\n"


def _passkey(draws: random.Random):
    n = _number(draws)
    piece = f" The pass key is {n}. Remember it. {n} is the pass key.\n"
    return [piece], "\nWhat is the pass key? The pass key is", f" {n}.", [n]


def _needle(draws: random.Random, others: int = 0):
    cities, numbers = draws.sample(CITIES, others + 1), _numbers(draws, others + 1)
    pieces = [_planted(*pair) for pair in zip(cities, numbers, strict=True)]
    ask = f"\nWhat is the special magic number for {cities[0]}? The special magic number for {cities[0]} is:"
    draws.shuffle(pieces)
    return pieces, ask, f" {numbers[0]}.", numbers[:1]


def _multi_key(draws: random.Random):
    return _needle(draws, others=7)


def _multi_value(draws: random.Random):
    city, numbers = draws.choice(CITIES), _numbers(draws, 3)
    ask = f"\nWhat are all the special magic numbers for {city}? The special magic numbers for {city} are:"
    return [_planted(city, n) for n in numbers], ask, f" {', '.join(numbers)}.", numbers


def _multi_query(draws: random.Random):
    cities, numbers = draws.sample(CITIES, 3), _numbers(draws, 3)
    pieces, names = [_planted(*pair) for pair in zip(cities, numbers, strict=True)], _joined(cities)
    draws.shuffle(pieces)
    ask = f"\nWhat are the special magic numbers for {names}? The special magic numbers for {names} are:"
    return pieces, ask, f" {', '.join(numbers)}.", numbers


def _variable_tracking(draws: random.Random):
    """A chain of three names that come to one number, and another chain to another; names are two letters."""
    names = [first + second for first, second in zip(*(draws.sample(LETTERS, 6) for _ in range(2)), strict=True)]
    chains, numbers = (names[:3], names[3:]), _numbers(draws, 2)
    lines = [
        [f"\nVAR {name} = {number if i == 0 else 'VAR ' + chain[i - 1]}\n" for i, name in enumerate(chain)]
        for chain, number in zip(chains, numbers, strict=True)
    ]
    order = draws.sample([0] * 3 + [1] * 3, 6)
    pieces = [lines[chain].pop(0) for chain in order]
    ask = f"\nWhich variables are assigned the value {numbers[0]}? The variables assigned the value {numbers[0]} are:"
    return pieces, ask, f" {', '.join(chains[0])}.", chains[0]


def _aggregation(draws: random.Random):
    """The word that was named most often: five times, among four that were named once or twice."""
    first, *others = draws.sample(WORDS, 5)
    named = [first] * 5 + [word for word in others for _ in range(draws.randint(1, 2))]
    draws.shuffle(named)
    ask = "\nWhich word was named most often? The word named most often is"
    return [f" The word is {word}.\n" for word in named], ask, f" {first}.", [first]


_DRAWN: dict[str, Callable] = {
    "passkey": _passkey,
    "needle": _needle,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "multi-query": _multi_query,
    "variable-tracking": _variable_tracking,
    "aggregation": _aggregation,
}
KINDS: tuple[str, ...] = tuple(_DRAWN)
WORDING = {
    "passkey": "one number in noise, KIVI's form",
    "needle": "a magic number for a city in a text, by length and depth",
    "multi-key": "eight needles, one is asked",
    "multi-value": "three numbers for one city",
    "multi-query": "three cities asked at once",
    "variable-tracking": "a chain of variables, beside another",
    "aggregation": "the word that was named most often",
}
