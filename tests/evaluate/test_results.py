"""Rows in a file: resuming, damage, a full disk, and the summary by hand."""

import copy
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_tiny import tiny_llama, tokens

from kvist.evaluate.contenders import contender, floors
from kvist.evaluate.results import Cell, Results, Row, cell_of, described, digest_of
from kvist.evaluate.suite import summary
from kvist.evaluate.task import Measured, Subject, run, spread
from kvist.evaluate.tasks.fidelity import Perplexity
from kvist.evaluate.windows import Text
from kvist.methods import parse
from kvist.plan import Recipe

TEXT = Text(tokens(3, 48), "tokens", "abc")
METHODS = ("exact", "int4")


class Counted:
    """How many forward passes a model makes."""

    def __init__(self, model):
        self.model, self.forwards = model, 0

    def __enter__(self):
        self.handle = self.model.register_forward_hook(self._note)
        return self

    def _note(self, *_):
        self.forwards += 1

    def __exit__(self, *_):
        self.handle.remove()


def measured(results, methods=METHODS, mode="stored", text=TEXT, model=None, items=None, stress="none", **options):
    task = Perplexity(text, mode, **options)
    return run(task, Subject.of(model or tiny_llama(), stress), [contender(each) for each in methods], results, items)


def kls(cells) -> list:
    return [cell.values["kl"] for cell in cells]


def test_a_second_run_measures_nothing(tmp_path):
    file, told = tmp_path / "rows.jsonl", []
    subject, some = Subject.of(tiny_llama()), [contender(each) for each in METHODS]
    first = run(Perplexity(TEXT), subject, some, Results(file), tick=lambda *at: told.append(at))
    assert told == [("ppl", n, 6) for n in range(7)] and len(file.read_text().splitlines()) == 6
    with Counted(tiny_llama()) as counted:
        assert kls(measured(Results(file))) == kls(first) and counted.forwards == 0
        # other modes, texts and stresses are other measurements
        measured(Results(file), mode="simulated")
        measured(Results(file), text=Text(TEXT.windows, "tokens", "abd"))
        measured(Results(file), stress="mild")
    assert counted.forwards == 3 * 9 and len(file.read_text().splitlines()) == 24
    with Counted(tiny_llama()) as counted:
        more = measured(Results(file), ("exact", "int4 group=0", "int8"))
    assert counted.forwards == 6  # the same recipe by another name is known
    assert more[1].values == first[1].values and len(more[2].items) == 3
    assert [cell.method for cell in more] == ["exact", "int4 group=0", "int8"]
    assert len(summary(more, "int4 group=0")) == 3


def test_batches_and_parts_come_to_the_same(tmp_path):
    whole = measured(Results(), batch=3)
    results = Results(tmp_path / "rows.jsonl")
    measured(results, items=[1])
    for one, other in zip(measured(results, batch=2), whole, strict=True):
        assert one.items == other.items == [0, 1, 2]
        assert one.values["kl"] == pytest.approx(other.values["kl"], rel=0.02)
        assert one.bits == other.bits
    assert [len(rows) for rows in results.rows.values()] == [2, 2]


def test_rows_say_what_decides_them():
    results = Results()
    measured(results, ("kivi:2",), stress="strong")
    ((row,),) = ([rows[0] for rows in results.rows.values()],)
    assert row.recipe["name"] == "kivi" and row.recipe["layers"][0]["key"]["codec"]["levels"]["bits"] == 2
    assert row.stress == "strong" and set(row.versions) == {"kvist", "torch", "transformers"} and row.seconds > 0
    assert row.settings["data"] == "abc" and row.metric == 1 and row.dtype == "float32" and "llama-" in row.model
    assert Row.model_validate_json(row.line) == row


def test_a_torn_line_is_measured_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    whole = measured(Results(file))
    lines = file.read_text().splitlines(keepends=True)
    for cut in (1, 40, len(lines[-1]) - 1):
        file.write_text("".join(lines[:-1]) + lines[-1][:cut])
        assert kls(measured(Results(file))) == kls(whole)
        assert sorted(map(len, Results(file).rows.values())) == [3, 3]


@contextmanager
def at_most(size: int):
    """No file grows beyond so many bytes: the kernel takes a part of a write and refuses the rest."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_full_disk_loses_nothing(share, tmp_path):
    file, whole = tmp_path / "rows.jsonl", measured(Results(tmp_path / "whole.jsonl"))
    sizes = [len(line) for line in (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)]
    with (
        at_most(int(sum(sizes[:2]) + share * sizes[2])),
        pytest.raises(OSError, match=r"rows.jsonl could not be written: .*goes on from there"),
    ):
        measured(Results(file))
    assert len(file.read_text().splitlines()) == 2 and all(map(json.loads, file.read_text().splitlines()))
    assert kls(measured(Results(file))) == kls(whole) and len(file.read_text().splitlines()) == 6


def test_one_recipe_by_two_names_is_measured_once():
    results = Results()
    with Counted(tiny_llama()) as counted:
        one, other = measured(results, ("int4", "int4 group=0"))
    assert counted.forwards == 6 and len(results.rows) == 1
    assert one.values == other.values and (one.method, other.method) == ("int4", "int4 group=0")


def test_what_decides_a_number_makes_another_cell():
    facts = row("a", [0], kl=[0.5]).model_dump()
    changed = {"metric": 2, "settings": {"seqlen": 4}, "part": "keys"}
    decisive = ("task", "metric", "settings", "model", "dtype", "stress", "digest", "part")
    cells = {cell_of(facts | {name: changed.get(name, "other")}) for name in decisive}
    assert len(cells | {cell_of(facts)}) == 1 + len(decisive)
    same = {"method": "b", "device": "cuda", "bits": 9.0, "items": (3,), "seconds": 7.0, "versions": {"kvist": "9"}}
    assert cell_of(facts | same) == cell_of(facts)


def test_another_precision_is_another_cell():
    results, half = Results(), copy.deepcopy(tiny_llama()).to(torch.bfloat16)
    measured(results, ("int4",))
    measured(results, ("int4",), model=half)
    assert {rows[0].dtype for rows in results.rows.values()} == {"float32", "bfloat16"}


def test_a_contender_that_does_not_suit_is_refused_before_any_work():
    subject = Subject.of(tiny_llama())
    for others, words in (
        (floors(torch.float32), "ppl needs a recipe, and floor: bfloat16 is none"),
        ([contender("kvmix k=2,3,4 v=2,3,4")], "3 layers"),
        ([contender("kvquant")], "needs"),
    ):
        with Counted(tiny_llama()) as counted, pytest.raises(ValueError, match=words):
            run(Perplexity(TEXT), subject, [contender("exact"), *others], Results())
        assert counted.forwards == 0


@dataclass
class Kinds:
    """A task whose items are of given kinds, and that notes which of them come together."""

    kinds: list[int]
    batch: int
    together: list[tuple[int, ...]] = field(default_factory=list)
    name, metric, settings, recipes_only = "kinds", 1, {}, True

    @property
    def count(self) -> int:
        return len(self.kinds)

    def kin(self, item: int) -> int:
        return self.kinds[item]

    def measure(self, model, contenders, items):
        self.together.append(items)
        yield Measured(0, 4.0 + self.kinds[items[0]], 0.0, {"score": [self.kinds[i] for i in items]})


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 14))
def test_items_of_different_kin_never_share_a_batch(kinds, batch, limit):
    task, subject, exact, results = Kinds(kinds, batch), Subject.of(tiny_llama()), [contender("exact")], Results()
    some = spread(task, limit)
    assert len(some) == min(limit, len(kinds)) and some[0] == 0 and some[-1] < len(kinds)
    assert max((b - a for a, b in pairwise(some)), default=0) <= -(-len(kinds) // len(some))
    (part,) = run(task, subject, exact, results, some)
    assert part.items == some and part.bits == pytest.approx(4 + sum(kinds[i] for i in some) / len(some))
    (whole,) = run(task, subject, exact, results)
    assert sorted(i for items in task.together for i in items) == list(range(len(kinds)))
    assert all(len(items) <= batch and len({kinds[i] for i in items}) == 1 for items in task.together)
    assert whole.values["score"] == kinds and whole.among(some).bits == part.bits


def test_other_weights_are_another_model():
    results = Results()
    measured(results)
    measured(results, model=tiny_llama(layers=3))
    assert len(results.rows) == 4 and len({rows[0].model for rows in results.rows.values()}) == 2


def test_foreign_files_are_refused_and_left_alone(tmp_path):
    for text in ("hello", "hello\n", '{"task": 1}\n', "[]\n"):
        file = tmp_path / "other"
        file.write_text(text)
        with pytest.raises(ValueError, match="another --out"):
            Results(file)
        assert file.read_text() == text
    with pytest.raises(ValueError, match="a folder"):
        Results(tmp_path)
    with pytest.raises(ValueError, match="found none"):
        Results(tmp_path / "no" / "rows.jsonl")


def test_a_value_per_item():
    with pytest.raises(ValueError, match="kl has 1 values for 2 items"):
        row("a", [0, 1], kl=[0.5])


def test_digests_and_descriptions():
    same = parse("int4").model_copy(update={"prefill": "stored"})
    assert digest_of(parse("int4")) == digest_of(same) != digest_of(parse("int4 group=32"))
    assert described(parse("kivi:2")) == parse("kivi:2").model_dump(mode="json")


def test_fitted_tables_are_told_by_their_hash():
    from kvist.demo.model import recipe

    made = recipe("kvquant:2")
    text = json.dumps(described(made))
    plain = made.model_dump()
    low = list(plain["layers"][0]["key"]["codec"]["range"]["low"])
    plain["layers"][0]["key"]["codec"]["range"]["low"] = (low[0] - 1, *low[1:])
    assert len(text) < len(made.model_dump_json()) / 2
    assert json.dumps(described(Recipe.model_validate(plain))) != text


def test_items_are_spread_evenly():
    task = Perplexity(Text(tokens(10, 8), "t", "d"))
    assert spread(task, None) == list(range(10)) and spread(task, 99) == list(range(10))
    assert spread(task, 5) == [0, 2, 4, 6, 8] and spread(task, 3) == [0, 3, 6]


def row(method: str, items: list[int], **values) -> Row:
    fixed = {"task": "ppl", "metric": 1, "settings": {}, "model": "m", "dtype": "float32", "device": "cpu"}
    facts = {"stress": "none", "recipe": {}, "digest": method, "part": "both", "bits": 4.0, "seconds": 0.1}
    return Row(**fixed, **facts, method=method, items=tuple(items), values=values)


def test_summary_by_hand():
    a = Cell([row("a", [0, 1], nll=[4.0, 8.0], tokens=[4, 4], kl=[0.2, 0.4])])
    rows = [row("b", [1, 0], nll=[10.0, 6.0], tokens=[4, 4], kl=[0.1, 0.1])]
    b = Cell([*rows, row("b", [2], nll=[99.0], tokens=[4], kl=[9.0])])
    first, second = summary([a, b], "a")
    assert first["perplexity"]["value"] == pytest.approx(math.exp(12 / 8)) and first["items"] == 2
    assert second["perplexity"]["value"] == pytest.approx(math.exp(16 / 8)) and second["items"] == 2
    assert first["kl"]["value"] == pytest.approx(0.3) and second["kl"]["value"] == pytest.approx(0.1)
    # both windows say 2 nats in 4 tokens: the pair knows what neither does alone
    change = second["log_perplexity_difference"]
    assert [change[k] for k in ("value", "low", "high")] == [0.5] * 3
    assert second["perplexity"]["high"] > second["perplexity"]["low"]
    assert second["kl_difference"]["value"] == pytest.approx(-0.2)
    assert set(first["log_perplexity_difference"].values()) == {0.0}
    with pytest.raises(ValueError, match="no item"):
        summary([a.among([0]), b.among([1])], "a")
    with pytest.raises(ValueError, match="not measured"):
        summary([a, b], "c")


def test_differences_are_to_both_sides_where_they_were_measured():
    both, keys = row("a", [0, 1], kl=[0.5, 0.3]), row("a", [0, 1], kl=[0.2, 0.2])
    cells = [Cell([keys.model_copy(update={"part": "keys"})]), Cell([both])]
    first, second = summary(cells, "a")
    assert (first["part"], second["part"]) == ("keys", "both")
    assert first["kl_difference"]["value"] == pytest.approx(-0.2) and second["kl_difference"]["value"] == 0
    assert summary(cells[:1], "a")[0]["kl_difference"]["value"] == 0


def test_bits_are_of_the_items_that_are_compared():
    some = Cell([row("a", [0], kl=[0.1]).model_copy(update={"bits": 2.0}), row("a", [1, 2], kl=[0.3, 0.4])])
    assert some.bits == pytest.approx((2 + 4 + 4) / 3) and some.among([0, 9]).bits == 2
    assert some.among([1, 0]).bits == 3 and math.isnan(some.among([]).bits)
    assert [line["bits"] for line in summary([some, Cell([row("b", [1], kl=[0.1])])], "a")] == [4, 4]
