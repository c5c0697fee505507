"""Rows in a file: resuming, damage, and the summary by hand."""

import json
import math

import pytest
from kvist.evaluate.collect import Text, collect
from models_tiny import tiny_llama, tokens

from kvist.evaluate.results import Results, Row, recipe_digest, summary
from kvist.methods import parse

TEXT = Text(tokens(3, 48), "tokens", "abc")
RECIPES = {name: parse(name) for name in ("exact", "int4")}


def row(window: int, method: str = "a", nll: float = 1.0, kl: float = 0.0, **more) -> Row:
    fixed = {"model": "m", "dtype": "float32", "recipe": method, "mode": "stored", "source": "s", "data": "d"}
    numbers = {"seqlen": 5, "tokens": 4, "agreement": 1.0, "bits": 4.0, "seconds": 0.1}
    return Row(**fixed, **numbers, method=method, window=window, nll=nll, kl=kl, **more)


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


def test_a_second_run_measures_nothing(tmp_path):
    model, file, told = tiny_llama(), tmp_path / "rows.jsonl", []
    first = collect(model, TEXT, RECIPES, "stored", Results(file), tick=lambda *at: told.append(at))
    assert told == [(n, 6) for n in range(7)] and len(file.read_text().splitlines()) == 6
    with Counted(model) as counted:
        again = collect(model, TEXT, RECIPES, "stored", Results(file))
        assert counted.forwards == 0 and again == first
        # other modes, methods and texts are other measurements
        collect(model, TEXT, RECIPES, "simulated", Results(file))
        collect(model, TEXT._replace(digest="abd"), RECIPES, "stored", Results(file))
    assert counted.forwards == 2 * 9 and len(file.read_text().splitlines()) == 18
    with Counted(model) as counted:
        more = collect(model, TEXT, RECIPES | {"four": parse("int4"), "int8": parse("int8")}, "stored", Results(file))
    assert counted.forwards == 6  # the same recipe by another name is known
    assert more["four"] == first["int4"] and len(more["int8"]) == 3


def test_a_torn_line_is_measured_again(tmp_path):
    model, file = tiny_llama(), tmp_path / "rows.jsonl"
    whole = collect(model, TEXT, RECIPES, "stored", Results(file))
    lines = file.read_text().splitlines(keepends=True)
    for cut in (1, 40, len(lines[-1]) - 1):
        file.write_text("".join(lines[:-1]) + lines[-1][:cut])
        results = Results(file)
        assert len(results.rows) == 5
        again = collect(model, TEXT, RECIPES, "stored", results)
        assert [r.nll for rows in again.values() for r in rows] == [r.nll for rows in whole.values() for r in rows]
        assert len(Results(file).rows) == 6 and all(map(json.loads, file.read_text().splitlines()))


def test_other_weights_are_another_model():
    model, results = tiny_llama(), Results()
    collect(model, TEXT, RECIPES, "stored", results)
    collect(tiny_llama(layers=3), TEXT, RECIPES, "stored", results)
    assert len(results.rows) == 12 and len({r.model for r in results.rows.values()}) == 2


def test_foreign_files_are_refused_and_left_alone(tmp_path):
    for text in ("hello", "hello\n", '{"model": 1}\n', "[]\n"):
        file = tmp_path / "other"
        file.write_text(text)
        with pytest.raises(ValueError, match="another --out"):
            Results(file)
        assert file.read_text() == text
    with pytest.raises(ValueError, match="found a folder"):
        Results(tmp_path)
    with pytest.raises(ValueError, match="found none"):
        Results(tmp_path / "no" / "rows.jsonl")


def test_the_digest_of_a_recipe():
    same = parse("int4").model_copy(update={"prefill": "stored"})
    assert recipe_digest(parse("int4")) == recipe_digest(same) != recipe_digest(parse("int4 group=32"))


def test_summary_by_hand():
    a = [row(0, "a", nll=4.0, kl=0.2), row(1, "a", nll=8.0, kl=0.4)]
    b = [row(1, "b", nll=10.0, kl=0.1), row(0, "b", nll=6.0, kl=0.1), row(2, "b", nll=99.0)]
    first, second = summary({"a": a, "b": b}, "a")
    assert first["perplexity"]["value"] == pytest.approx(math.exp(12 / 8)) and first["windows"] == 2
    assert second["perplexity"]["value"] == pytest.approx(math.exp(16 / 8)) and second["windows"] == 2
    assert first["kl"]["value"] == pytest.approx(0.3) and second["kl"]["value"] == pytest.approx(0.1)
    # both windows say 2 nats in 4 tokens: the pair knows what neither does alone
    change = second["log_perplexity_difference"]
    assert [change[k] for k in ("value", "low", "high")] == [0.5] * 3
    assert second["perplexity"]["high"] > second["perplexity"]["low"]
    assert second["kl_difference"]["value"] == pytest.approx(-0.2)
    assert set(first["log_perplexity_difference"].values()) == {0.0}
    with pytest.raises(ValueError, match="no window"):
        summary({"a": a[:1], "b": b[:1]}, "a")
