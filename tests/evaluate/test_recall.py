"""Questions, where their facts lie, and the greedy answers to them."""

import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_tiny import tiny_llama, tokens

from kvist.demo.documents import documents
from kvist.demo.model import load
from kvist.evaluate import questions
from kvist.evaluate.contenders import contender
from kvist.evaluate.generation import Prompt, generate
from kvist.evaluate.measures import grid
from kvist.evaluate.questions import KINDS, draw
from kvist.evaluate.results import Results
from kvist.evaluate.task import Subject, run
from kvist.evaluate.tasks.recall import Haystack, Recall, plant, rescored
from kvist.methods import parse
from kvist.models.adapter import describe
from kvist.text import encode

EXACT = [contender("exact")]


@pytest.fixture(scope="module")
def bundled():
    return load(dtype="float32")


@pytest.fixture(scope="module")
def hay(bundled):
    return Haystack(tuple(document.text for document in documents(bundled[1], 24)), "demo")


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1 << 20))
def test_what_is_asked_was_planted(kind, seed):
    made = draw(kind, random.Random(seed))
    assert made == draw(kind, random.Random(seed))
    everything = "".join(made.pieces)
    assert questions.score(made.expected, everything) == questions.score(made.expected, made.answer) == 1
    assert questions.score(made.expected, "") == 0 and made.kind == kind
    numbers = re.findall(r"\d+", everything)
    assert not any(a != b and a in b for a in numbers for b in numbers)


def test_aggregation_asks_for_the_most_frequent():
    made = draw("aggregation", random.Random(3))
    said = [piece.split()[-1].rstrip(".") for piece in made.pieces]
    assert all(said.count(made.expected[0]) > said.count(word) for word in set(said) - set(made.expected))


def test_chains_lead_to_the_number():
    made = draw("variable-tracking", random.Random(5))
    assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", "".join(made.pieces)))
    number = re.search(r"value (\d+)", made.text)[1]

    def value(name):
        return value(assigned[name]) if name in assigned else name

    assert {name for name in assigned if value(name) == number} == set(made.expected)


def test_scores():
    assert questions.score(["12", "34"], "it is 12, not 345") == 0.5
    assert questions.score(["123"], "51234") == 0 and questions.score(["123"], "is: 123.") == 1
    assert questions.score(["AB"], "CAB, ABC") == 0
    with pytest.raises(ValueError, match="a kind of question"):
        draw("riddle", random.Random(0))


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_have_the_length_that_is_asked(kind, bundled, hay):
    _, tokenizer = bundled
    for length in (420, 1003):
        task = Recall(kind, tokenizer, hay, (length,), samples=3)
        for number in range(task.count):
            item = task.item(number)
            assert len(item.prompt.context) == length and item.prompt.context[0] == tokenizer.bos_token_id
            text = tokenizer.decode(item.prompt.context)
            assert all(piece.strip() in text for piece in item.question.pieces)


@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_facts_lie_at_their_depth(kind, bundled, hay):
    _, tokenizer = bundled
    task = Recall(kind, tokenizer, hay, (600,), (0.0, 0.3, 1.0), samples=2)
    for number in range(task.count):
        item = task.item(number)
        before, after = tokenizer.decode(item.prompt.context).split(item.question.pieces[0].strip())
        share = len(encode(tokenizer, before)) / (len(encode(tokenizer, before)) + len(encode(tokenizer, after)))
        assert share == pytest.approx(item.depth, abs=0.12)


def test_items_do_not_depend_on_what_else_is_asked(bundled, hay):
    _, tokenizer = bundled
    few = Recall("needle", tokenizer, hay, (400,), (0.5,), samples=1)
    more = Recall("needle", tokenizer, hay, (300, 400), (0.0, 0.5), samples=3)
    assert few.item(0) == more.item(9) and more.kin(9) == 400 and more.kin(0) == 300
    assert few.item(0) != Recall("needle", tokenizer, hay, (400,), (0.5,), samples=1, seed=1).item(0)


def test_a_context_that_is_too_short_is_refused(bundled, hay):
    with pytest.raises(ValueError, match="multi-key needs contexts of at least"):
        plant(bundled[1], draw("multi-key", random.Random(0)), hay, 60, None, random.Random(0))


def test_the_bundled_model_finds_a_needle(bundled, hay):
    model, tokenizer = bundled
    for kind, text in (("needle", hay), ("passkey", Haystack.noise())):
        task = Recall(kind, tokenizer, text, (300, 480), (0.2, 0.8), samples=1, batch=4)
        (cell,) = run(task, Subject.of(model), EXACT, Results())
        assert sum(cell.values["score"]) >= 3 and cell.values["length"] == [300, 300, 480, 480]
        assert rescored({}, cell.values) == cell.values
        lengths, depths, scores = grid(cell.values)
        assert (lengths, depths, scores.shape) == ([300, 480], [0.2, 0.8], (2, 2))
        assert scores.sum() == sum(cell.values["score"])


class Numbers:
    """A tokenizer of numbers, for models of random tokens."""

    def __init__(self, ends: int | None = None):
        self.eos_token_id = ends

    def decode(self, ids, skip_special_tokens=True):
        return "".join(f" {token}" for token in ids)


def asked(contexts, question=6, most=9, stops=()):
    rows = tokens(len(contexts), max(contexts) + question).tolist()
    return [
        Prompt(tuple(row[:n]), tuple(row[n : n + question]), most, stops) for row, n in zip(rows, contexts, strict=True)
    ]


def answers(prompts, *methods, **options):
    found = generate(tiny_llama(), Numbers(), [contender(each) for each in methods], prompts, **options)
    return [each.texts for each in found]


@torch.no_grad()
def test_answers_are_those_of_generate():
    prompts = asked((70, 44, 51))
    for prompt, text in zip(prompts, answers(prompts, "exact")[0], strict=True):
        ids = torch.tensor([prompt.context + prompt.question])
        made = tiny_llama().generate(ids, max_new_tokens=9, do_sample=False)
        assert text == Numbers().decode(made[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("prefill", ["exact", "stored"])
def test_a_batch_answers_as_its_rows_do(prefill):
    prompts, methods = asked((150, 90)), ("exact", "int8", "kivi:8 recent=32")
    together = answers(prompts, *methods, prefill=prefill, chunk=64)
    for row, prompt in enumerate(prompts):
        assert [texts[0] for texts in answers([prompt], *methods, prefill=prefill, chunk=64)] == [
            texts[row] for texts in together
        ]


def test_a_prompt_that_is_read_from_the_store_is_another_thing():
    exact, stored = (answers(asked((190,)), "hadamard:2", prefill=each, chunk=40) for each in ("exact", "stored"))
    assert exact != stored


def test_answers_end():
    (whole,) = answers(asked((60,)), "exact")[0]
    words = whole.split()
    assert len(words) == 9
    stop = f" {words[4]}"
    (cut,) = answers(asked((60,), stops=(stop,)), "exact")[0]
    assert cut == whole[: whole.index(stop)]
    assert answers(asked((60,), most=3), "exact")[0] == [" " + " ".join(words[:3])]
    (found,) = generate(tiny_llama(), Numbers(int(words[4])), EXACT, asked((60,)))
    assert found.texts == [" " + " ".join(words[: words.index(words[4])])]


def test_bits_are_those_of_the_prompt():
    model, recipe = tiny_llama(), parse("kivi:2 recent=32")
    (found,) = generate(model, Numbers(), [contender("kivi:2 recent=32")], asked((150, 150), most=2))
    bill = recipe.bill(describe(model).shape, 2, 150, 2, 150 + 6 + 2)
    assert found.bits == pytest.approx(8 * bill.total() / (2 * 2 * 150 * 2 * 64))
