"""Documents with planted facts, and questions about them, in the forms that the bundled model was trained on.

Everything follows from one seed. The text between the facts is ours: `text.txt` (sampled once from the model, see
dev/sample.py) and `notes.txt` (about caches).
"""

import random
import re
from dataclasses import dataclass
from functools import cache

from kvist.demo.model import REFERENCES

ROOM = REFERENCES / "documents"
# what the text between the facts may not hold: it could be taken for a fact
FORBIDDEN = re.compile(r"[^A-Za-z ,.;:!?'\-]|pass key|magic|[Rr]emember|print|Chapter|CHAPTER|[A-Z]{3}|:$|\b\w+:")
SHORTEST, LONGEST, SCORED = 1700, 1900, 256  # tokens
PER_DOCUMENT = {"pass key": 1, "magic number": 4, "assignment": 4, "table": 3}
TABLE_LINES = 24  # the model looks a word up best where the table ends the document, as in training
CITIES = ("Paris", "Oslo", "Lima", "Kyoto", "Boston", "Cairo", "London", "Rome", "Madrid", "Berlin", "Vienna", "Athens")
# fmt: off
WORDS = (
    "stone", "window", "river", "garden", "silver", "market", "candle", "forest", "bridge", "winter", "summer",
    "letter", "bottle", "basket", "copper", "village", "mountain", "orange", "ladder", "pencil", "island", "mirror", 
    "pocket", "needle", "harbor", "saddle", "feather", "kitchen", "shadow", "thunder", "velvet", "wagon",
)
# fmt: on


@dataclass(frozen=True)
class Question:
    """What is asked after a document, and the digits that answer it; `ids` of both."""

    kind: str
    text: str
    answer: str
    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """A text with facts in it, its token ids, and the questions about it. scored: its last tokens, whose next-token
    distributions are compared. open: a question that is answered freely."""

    text: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    scored: int
    open: Question


def documents(tokenizer, questions: int, seed: int = 0) -> list[Document]:
    """As many documents as it takes to ask `questions` questions."""
    made, random_ = [], random.Random(seed)
    while questions > 0:
        made.append(_document(tokenizer, random_, questions))
        questions -= len(made[-1].questions)
    return made


def _document(tokenizer, random_: random.Random, most: int) -> Document:
    pieces, table, asked = _facts(random_)
    budget = random_.randint(SHORTEST, LONGEST) - 1
    used = sum(len(_ids(tokenizer, piece)) for piece in [*pieces, table])
    for sentence in random_.sample(_filler(), len(_filler())):
        size = len(_ids(tokenizer, " " + sentence))
        if used + size > budget:
            break
        used += size
        pieces.append(" " + sentence)
    random_.shuffle(pieces)
    text = "".join(pieces).strip() + table
    asked = random_.sample(asked, min(most, len(asked)))
    ids = (tokenizer.bos_token_id, *_ids(tokenizer, text))
    questions = tuple(_question(tokenizer, *fact) for fact in asked)
    return Document(text, ids, questions, SCORED, questions[0])


def _facts(random_: random.Random) -> tuple[list[str], str, list[tuple[str, str, str]]]:
    """Pieces of text to plant anywhere, the table that comes last, and (kind, question, answer) about them."""
    planted, asked, words = [], [], random_.sample(WORDS, len(WORDS))
    for _ in range(PER_DOCUMENT["pass key"]):
        n = _number(random_)
        planted.append(f" The pass key is {n}. Remember it. {n} is the pass key.\n")
        asked.append(("pass key", "\nWhat is the pass key? The pass key is", f" {n}."))
    for city in random_.sample(CITIES, PER_DOCUMENT["magic number"]):
        n = _number(random_)
        planted.append(f" One of the special magic numbers for {city} is: {n}.\n")
        question = f"\nWhat is the special magic number for {city}? The special magic number for {city} is:"
        asked.append(("magic number", question, f" {n}."))
    for _ in range(PER_DOCUMENT["assignment"]):
        n, name = _number(random_), f"{words.pop()}-{words.pop()}"
        planted.append(f"\n{name} = {n}\n")
        asked.append(("assignment", f"\nprint({name}) ->", f" {n}"))
    lines = [(word, _number(random_, 3, 3)) for word in words[:TABLE_LINES]]
    asked += [("table", f"\n{word}:", f" {n}") for word, n in random_.sample(lines, PER_DOCUMENT["table"])]
    return planted, "\n\n" + "".join(f"{word}: {n}\n" for word, n in lines), asked


def _number(random_: random.Random, least: int = 4, most: int = 7) -> str:
    return "".join(random_.choices("0123456789", k=random_.randint(least, most)))


def _question(tokenizer, kind: str, text: str, answer: str) -> Question:
    return Question(kind, text, answer, tuple(_ids(tokenizer, text)), tuple(_ids(tokenizer, answer)))


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def _filler() -> list[str]:
    return [s for name in ("text.txt", "notes.txt") for s in (ROOM / name).read_text().splitlines()]
