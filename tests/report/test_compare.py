"""Sentences about differences: real ones, others, and what cannot be compared."""

import pytest
from rows import row, write

from kvist.evaluate.statistics import holm, mcnemar
from kvist.report.sentences import methods, runs

LEVELS = [0.1 * (1 + 0.01 * n) for n in range(12)]


def scores(right: int, of: int = 30) -> dict:
    return {"score": [1.0] * right + [0.0] * (of - right)}


def kl(factor: float) -> dict:
    return {"kl": [factor * level for level in LEVELS]}


def test_sentences_by_hand(tmp_path):
    made = [row("needle", "a", scores(28), bits=5), row("needle", "b", scores(15), bits=3)]
    made += [row("fidelity", "a", kl(1.0), bits=5), row("fidelity", "b", kl(2.0), bits=3)]
    made += [row("gsm8k", "a", scores(10), bits=5), row("gsm8k", "b", scores(10), bits=3)]
    path = write(tmp_path / "r.jsonl", made)
    needle, fidelity, gsm8k = methods("a", "b", path)
    ps = holm([mcnemar(scores(28)["score"], scores(15)["score"]), 2 / 2**12, 1.0])
    assert [needle.p, fidelity.p, gsm8k.p] == pytest.approx(ps)
    assert needle.sentence == (
        "needle (small, as trained, 30 items): a is really better than b: a mean score that is higher (0.933 against "
        f"0.500, difference 0.433 {_ends(needle)}, p < 0.001), at 5.00 against 3.00 bits."
    )
    assert "KL that is lower" in fidelity.sentence and fidelity.real
    assert "no difference between a and b is shown" in gsm8k.sentence and not gsm8k.real
    assert "b is really worse than a" in methods("b", "a", path)[1].sentence


def test_few_items_are_too_few(tmp_path):
    path = write(tmp_path / "r.jsonl", [row("fidelity", name, {"kl": [0.1 * i, 0.2]}) for i, name in enumerate("ab")])
    (found,) = methods("a", "b", path)
    assert not found.real and "2 items are too few" in found.sentence


def test_common_items_only(tmp_path):
    made = [row("needle", "a", scores(30)), row("needle", "b", scores(0, 10), items=tuple(range(20, 30)))]
    (found,) = methods("a", "b", write(tmp_path / "r.jsonl", made))
    assert found.items == 10 and found.difference.value == 1.0
    made[1] = row("needle", "b", scores(0, 10), items=tuple(range(30, 40)))
    with pytest.raises(ValueError, match="no common item"):
        methods("a", "b", write(tmp_path / "r.jsonl", made))
    with pytest.raises(ValueError, match="twice"):
        methods("a", "a", tmp_path / "r.jsonl")


def test_two_runs(tmp_path):
    exact, floor = row("fidelity", "exact", kl(0.0)), row("fidelity", "floor: batch 1", kl(1e-6))
    old = write(tmp_path / "old.jsonl", [exact, floor, row("fidelity", "a", kl(1.0)), row("fidelity", "b", kl(2.0))])
    new = write(tmp_path / "new.jsonl", [exact, row("fidelity", "a", kl(1.0)), row("fidelity", "b", kl(1.5))])
    same, changed = runs(old, new)
    assert (same.a, same.b) == ("a (old.jsonl)", "a (new.jsonl)") and not same.real and same.p == 1.0
    assert changed.real and "b (old.jsonl) is really worse than b (new.jsonl)" in changed.sentence
    # one method in each file: those two are compared, whatever they are called
    one = write(tmp_path / "one.jsonl", [exact, row("fidelity", "a", kl(1.0))])
    two = write(tmp_path / "two.jsonl", [exact, row("fidelity", "c", kl(2.0))])
    (found,) = runs(one, two)
    assert (found.a, found.b) == ("a (one.jsonl)", "c (two.jsonl)") and found.real
    other = write(tmp_path / "other.jsonl", [row("fidelity", "a", kl(1.0), settings={"source": "wikitext2"})])
    with pytest.raises(ValueError, match="no common item"):
        runs(one, other)


def _ends(found) -> str:
    return f"[{found.difference.low:.3f}, {found.difference.high:.3f}]"
