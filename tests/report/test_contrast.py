"""Tables by hand: frontiers, ratios, marks; and sentences that say no more than the numbers."""

import itertools
import math

import numpy as np
import pytest
from rows import row, write

from kvist.evaluate.registry import kind_of
from kvist.report import study
from kvist.report.load import load
from kvist.report.look import look, number, order
from kvist.report.sentences import verdict
from kvist.report.study import contrasts, judged, lines, to_exact, to_nothing
from kvist.report.tables import main, scores

NOISE = np.random.default_rng(0).normal(0, 0.02, 16)


def kl(level: float) -> dict:
    return {"kl": (level * (1 + NOISE)).tolist()}


def answers(right: int, of: int = 20, **more) -> dict:
    return {"score": [1.0] * right + [0.0] * (of - right)}


@pytest.fixture
def group(tmp_path):
    made = [
        row("fidelity", "exact", kl(0.0), bits=16),
        row("fidelity", "cheap", kl(0.4), bits=3),
        row("fidelity", "dear", kl(0.8), bits=4),
        row("fidelity", "same", {"kl": (0.401 * (1 + NOISE[::-1])).tolist()}, bits=5),
        row("fidelity", "good", kl(0.1), bits=6),
        row("fidelity", "floor: batch 1", kl(1e-5), bits=16),
    ]
    return load(write(tmp_path / "r.jsonl", made))[0]


def test_lines_by_hand(group):
    found = lines(group, "cheap")
    assert list(found) == ["cheap", "dear", "same", "good", "exact"]
    assert [line.method for line in found.values() if line.frontier] == ["cheap", "good", "exact"]
    verdicts = {name: (line.baseline and line.baseline.verdict) for name, line in found.items()}
    assert verdicts == {"cheap": None, "dear": "worse", "same": "=", "good": "better", "exact": None}
    assert {name: line.cheaper.against for name, line in found.items() if line.cheaper} == {
        "dear": "cheap",
        "same": "cheap",
        "good": "cheap",
    }
    assert found["good"].cheaper.difference.value == pytest.approx(-0.3 * (1 + NOISE.mean()))
    # three tests: the least p of 20,000 flips of 16 signs, three times
    assert found["dear"].baseline.p == pytest.approx(3 / 20_001, rel=1.1) and found["same"].baseline.p > 0.3


def test_the_seed_reaches_the_tests(group):
    """16 differences have more flips than are drawn: p and the ends of intervals follow the seed, of both columns."""
    known = {entry.method: entry for entry in group.whole.entries}
    pairs = [(known[name], known["cheap"]) for name in ("dear", "same", "good")]
    of = {seed: lines(group, "cheap", seed) for seed in (0, 5)}
    for seed, found in of.items():
        expected = contrasts(pairs, "kl", seed)
        assert {name: found[name].baseline for name in expected} == expected
        assert {name: found[name].cheaper for name in expected} == expected
    assert of[0]["same"].baseline != of[5]["same"].baseline and of[0]["same"].baseline.p != of[5]["same"].baseline.p


def test_the_frontier_against_all_pairs(tmp_path):
    points = {str(i): tuple(map(float, pair)) for i, pair in enumerate(np.random.default_rng(3).random((40, 2)))}
    made = [row("fidelity", name, {"kl": [y]}, bits=x) for name, (x, y) in points.items()]
    (group,) = load(write(tmp_path / "r.jsonl", made))
    beaten = {a for a, b in itertools.permutations(points, 2) if all(np.less(points[b], points[a]))}
    assert {name for name, line in lines(group, "0").items() if line.frontier} == set(points) - beaten


def test_answers_against_exact(tmp_path):
    made = [row("needle", "exact", answers(20), bits=16), row("needle", "bad", answers(8), bits=3)]
    made.append(row("needle", "fair", answers(18), bits=4))
    (group,) = load(write(tmp_path / "r.jsonl", made))
    found = to_exact(group)
    assert (found["bad"].verdict, found["fair"].verdict) == ("worse", "=")
    assert found["bad"].p == pytest.approx(2 * 2 / 2**12) and found["fair"].p == pytest.approx(0.5)
    read = study.read(tmp_path)
    assert any("fair at 4 bits is the cheapest that is not shown" in sentence for sentence in verdict(read))
    assert main(read, read.places[0]) is None  # no divergence was measured
    table = scores(read, read.places[0])
    assert [row[2].text for row in table.rows] == ["▼ 40.0", "= 90.0", "100.0"]


def test_one_family_of_tests(group):
    whole = group.whole
    known = {entry.method: entry for entry in whole.entries}
    one = contrasts([(known["good"], known["dear"])], "kl")["good"].p
    many = contrasts([(known[name], known["dear"]) for name in ("good", "cheap", "same", "exact")], "kl")
    assert many["good"].p == pytest.approx(4 * one) and many["good"].verdict == "better"


def test_growth_and_what_accumulates(tmp_path):
    def horizon(slope: float, extra: float) -> dict:
        curves = [[0.1 + 0.064 * slope * k + n * math.sin(7 * k) for k in range(12)] for n in NOISE]
        probes = [[[512, 0.2 + extra + n, 0.2]] for n in NOISE]
        return {"kl": [0.1] * len(NOISE), "kl_curve": curves, "kl_at_once": probes}

    made = [row("horizon", "exact", horizon(0, 0)), row("horizon", "flat", horizon(0, 0))]
    made.append(row("horizon", "grows", horizon(0.5, 0.1)))
    (group,) = load(write(tmp_path / "r.jsonl", made))
    slope, (_, dots) = kind_of("horizon").statistics["slope"], kind_of("horizon").figures
    growth, ends = to_nothing(group, slope.null), list(dots.kinds.values())
    more = judged({e.method: ("", *(each(e.cell.values) for each in ends)) for e in group.whole.methods})
    assert (growth["flat"].verdict, growth["grows"].verdict) == ("=", "worse") and "exact" not in growth
    assert growth["grows"].difference.value == pytest.approx(0.5, abs=0.05)
    assert (more["flat"].verdict, more["grows"].verdict) == ("=", "worse")
    assert more["grows"].difference.value == pytest.approx(0.1 + NOISE.mean())


def test_numbers_and_looks():
    assert [number(x) for x in (0.0, 0.543210, 12.34, 123.4, 12345.6, -0.0123, 0.00002)] == [
        "0",
        "0.543",
        "12.3",
        "123",
        "12,346",
        "−0.0123",
        "2.0e−5",
    ]
    assert look("kivi:2").family == look("kivi k=4 v=2").family == look("kivi, solved").family == "kivi"
    assert [look(name).digit for name in ("kivi:2", "int4 (control)", "QuantizedCache hqq:4", "kivi k=4 v=2")] == [
        "2",
        "4",
        "4",
        "",
    ]
    assert look("int3").colour == look("int4 (control)").colour != look("somebody's:2").colour
    assert sorted(["kivi:4", "kivi x=1", "hadamard:2", "kivi:2"], key=order)[:3] == ["kivi:2", "kivi:4", "kivi x=1"]
