"""The table of widths and its file, the rules that fill it, and the solvers against brute force."""

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.allocation import Allocation, rules, solve
from kvist.allocation.solve import MOST, Choice, Impossible, exact, greedy
from kvist.types import ModelIdentity

MODEL = ModelIdentity(name="m", kind="llama", config="c", layers=3, heads=2, key_dim=64, value_dim=64)
FULL = Allocation(k=(3, 2, 16), v=(4, 2, 8), model=MODEL, ratios="reference", note='by "hand"')
WIDTH = st.sampled_from((1, 2, 3, 4, 8, 16))


@given(st.lists(st.tuples(WIDTH, WIDTH), min_size=1, max_size=40), st.text(max_size=20))
def test_there_and_back(tmp_path_factory, pairs, note):
    path = tmp_path_factory.mktemp("there") / "a.json"
    k, v = zip(*pairs, strict=True)
    allocation = Allocation(k=k, v=v, note=note)
    allocation.save(path)
    assert Allocation.load(path) == allocation


def test_the_file_is_for_people(tmp_path):
    FULL.save(tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert ' "k": [3, 2, 16],' in lines and ' "v": [4, 2, 8],' in lines
    assert Allocation.load(tmp_path / "a.json") == FULL
    (tmp_path / "b.json").write_text('{"v": [2], "k": [3]}')
    assert Allocation.load(tmp_path / "b.json") == Allocation(k=(3,), v=(2,))
    with pytest.raises(ValueError, match="expected a folder"):
        FULL.save(tmp_path / "none" / "a.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it is not JSON: Expecting property name"),
        ("[]", r"expected named fields, found \[\]"),
        ('{"k": [2]}', "v: Field required"),
        ('{"k": [], "v": []}', "found 0 and 0"),
        ('{"k": [2, 3], "v": [2]}', "as many layers, found 2 and 1"),
        ('{"k": [3, 5], "v": [4, 2]}', r"bits must be one of \(1, 2, 3, 4, 8, 16\), found 5 in k of layer 1"),
        ('{"k": [2.5], "v": [4]}', r"k\.0: .*integer"),
        ('{"k": [true], "v": [4]}', r"k\.0: .*integer"),
        ('{"k": [2], "v": ["4"]}', r"v\.0: .*integer"),
        ('{"k": [2], "v": [2],}', "it is not JSON: .* line 1 column 21"),
        ('{"k": [2], "v": [2], "bits": 3}', "bits: Extra inputs"),
        ('{"k": [2], "v": [2], "ratios": "ours"}', "ratios: .*'paper' or 'reference'"),
        (json.dumps({"k": [2], "v": [2], "model": MODEL.model_dump()}), "m has 3 layers to serve, found 1 widths"),
    ],
)
def test_a_file_that_is_no_allocation_is_refused_in_one_sentence(text, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"allocation.*{words}") as caught:
        Allocation.load(path)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, reason in (("none.json", "No such file"), ("binary", "not text"), (".", "a folder")):
        with pytest.raises(ValueError, match=f"expected an allocation's JSON file at .*{reason}"):
            Allocation.load(tmp_path / name)


def test_one_width_is_repeated_and_lists_must_agree():
    assert Allocation.of(2, (3, 4)) == Allocation(k=(2, 2), v=(3, 4)) == Allocation.of([2, 2], [3, 4])
    assert Allocation.of((3, 3, 3), 2, model=MODEL).model == MODEL
    with pytest.raises(ValueError, match="as many layers"):
        Allocation.of((2, 2, 2), (3, 4))


def test_mean_bits_as_the_paper_writes_them():
    scores = list(range(32))
    assert str(rules.top(scores, scores)) == str(rules.reference(scores, scores)) == "k2.19v2.38"
    assert str(rules.top(scores, scores, 0.28)) == "k2.28v2.56"


SCORES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40)


@given(SCORES, st.floats(0, 1))
def test_top_layers_have_the_high_width_and_none_of_the_others_scores_more(scores, share):
    for side, found in zip(
        zip(*scores, strict=True), _sides(rules.top(*zip(*scores, strict=True), share)), strict=True
    ):
        widths, high, low = found
        chosen = [i for i, bits in enumerate(widths) if bits == high]
        assert set(widths) <= {high, low} and len(chosen) == max(1, round(share * len(scores)))
        rest = [i for i in range(len(scores)) if i not in chosen]
        assert all(side[i] > side[j] or (side[i] == side[j] and i < j) for i in chosen for j in rest)


def _sides(allocation):
    return (allocation.k, 3, 2), (allocation.v, 4, 2)


def test_keys_and_values_are_ranked_apart_by_hand():
    found = rules.top([5, 1, 9, 2, 3], [1, 7, 2, 7, 0], 0.4, high=(4, 8), low=(1, 2))
    assert (found.k, found.v) == ((4, 1, 4, 1, 1), (2, 8, 2, 8, 2))
    assert rules.top([5, 1, 9, 2, 3], [0, 0, 0, 0, 0], 0).v == (4, 2, 2, 2, 2)


@pytest.mark.parametrize(("layers", "high"), [(32, 6), (28, 4), (10, 2), (9, 0), (40, 8), (1, 0)])
def test_layers_counted_as_in_the_published_code(layers, high):
    found = rules.reference(range(layers), range(layers))
    assert found.k == (2,) * (layers - high) + (3,) * high and found.v == (2,) * (layers - high) + (4,) * high
    assert found.ratios == "reference" and rules.top(range(layers), range(layers)).ratios == "paper"


def test_plain():
    assert _widths(rules.plain(4)) == ((4, 3, 3, 4), (3, 2, 2, 3))
    assert _widths(rules.plain(4, 1)) == ((3, 2, 2, 3), (2, 1, 1, 2))
    assert _widths(rules.plain(3, 4)) == ((8, 8, 8), (8, 4, 8))
    assert _widths(rules.plain(3, 3)) == ((8, 4, 8), (4, 3, 4))
    assert _widths(rules.plain(1)) == ((4,), (3,))


def _widths(allocation):
    return allocation.k, allocation.v


def test_shuffled():
    start = rules.top(range(30), range(30)).model_copy(update={"ratios": "reference"})
    found = {rules.shuffled(start, seed) for seed in range(5)}
    assert len(found) == 5 and found == {rules.shuffled(start, seed) for seed in range(5)}
    for one in found:
        assert sorted(one.k) == sorted(start.k) and sorted(one.v) == sorted(start.v) and one.ratios == "reference"
        assert [b == 3 for b in one.k] != [b == 4 for b in one.v], "keys and values are drawn apart"


def test_words_of_the_command_line():
    assert rules.parse_widths("k3v4") == (3, 4) and rules.parse_widths("k16v1") == (16, 1)
    assert rules.parse_share("20%") == 0.2 == rules.parse_share(0.2) == rules.parse_share("0.2")
    for text in ("3,4", "k3", "k5v2", "v4k3", "k3v4x", ""):
        with pytest.raises(ValueError, match=r"expected bits of keys and values such as k3v4, .*found"):
            rules.parse_widths(text)
    for text in ("120%", "-1", "many", "nan", ""):
        with pytest.raises(ValueError, match=r"expected a share such as 20% or 0\.2, found"):
            rules.parse_share(text)


def test_rules_refuse_what_they_cannot_rank():
    with pytest.raises(ValueError, match="found 2 and 3"):
        rules.top([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="infinite or none"):
        rules.reference([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ValueError, match="between 0 and 1, found 20"):
        rules.top([1], [1], 20)
    with pytest.raises(ValueError, match="base must be one of"):
        rules.plain(4, 5)


CHOICE = st.builds(Choice, st.just(2), st.just(2), st.integers(0, 12), st.integers(-3, 12))
LAYERS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), max_size=6)


def total(layers, chosen) -> tuple[float, int]:
    """Loss and bytes of a choice per layer."""
    picked = [choices[i] for choices, i in zip(layers, chosen, strict=True)]
    return sum(choice.loss for choice in picked), sum(choice.nbytes for choice in picked)


def brute_force(layers, budget) -> tuple[float, int] | None:
    """The least loss, and of those the fewest bytes, by trying everything."""
    every = (total(layers, chosen) for chosen in product(*(range(len(choices)) for choices in layers)))
    return min((found for found in every if found[1] <= budget), default=None)


@given(LAYERS, st.integers(0, 60))
def test_exact_is_the_best_of_all_and_greedy_never_better(layers, budget):
    best, least = brute_force(layers, budget), brute_force(layers, 10**9)
    if best is None:
        fewest = sum(min(choice.nbytes for choice in choices) for choices in layers)
        for solver in (exact, greedy):
            with pytest.raises(
                Impossible, match=f"budget of {budget} bytes .*least possible is {fewest} bytes"
            ) as caught:
                solver(layers, budget)
            assert caught.value.least == fewest
            assert total(layers, solver(layers, fewest))[1] == fewest
        return
    assert total(layers, exact(layers, budget)) == best
    loss, nbytes = total(layers, greedy(layers, budget))
    assert nbytes <= budget and loss >= best[0] >= least[0]


def test_eight_layers_against_brute_force():
    layers = [[Choice(b, b, 7 * b + i % 3, (i * i % 11 + 1) * (4 - b) ** 2) for b in (1, 2, 4)] for i in range(8)]
    for budget in range(8 * 7 + 7, 8 * 28 + 8, 5):
        assert total(layers, exact(layers, budget)) == brute_force(layers, budget)


@given(LAYERS)
def test_a_larger_budget_never_costs_loss(layers):
    fewest = sum(min(choice.nbytes for choice in choices) for choices in layers)
    found = [total(layers, exact(layers, budget))[0] for budget in range(fewest, fewest + 40)]
    assert found == sorted(found, reverse=True)


def test_greedy_by_hand():
    """From 2 bytes. Saved per byte: 5 and 2 in the first layer, 4 and 1 in the second. A budget of 4 buys the 5 and the
    4; of 6 bytes the 2 as well, in 2 more; 5 leave a byte that buys nothing but the unsteady choice of the second."""
    layers = [
        [Choice(1, 1, 1, 20), Choice(2, 2, 2, 15), Choice(4, 4, 4, 11)],
        [Choice(1, 1, 1, 9), Choice(2, 2, 2, 5), Choice(3, 3, 3, 4.5), Choice(4, 4, 4, 3)],
    ]
    assert greedy(layers, 2) == [0, 0] and greedy(layers, 4) == [1, 1]
    assert greedy(layers, 5) == [1, 2] and greedy(layers, 6) == [2, 1] and greedy(layers, 8) == [2, 3]
    assert exact(layers, 5) == [1, 2]


def test_eighty_layers_of_twenty_five_choices_need_few_states(monkeypatch):
    """Losses that fall with bits, scales and windows on top of the codes: a few hundred states at most."""
    seen, unbeaten = [], solve._unbeaten
    monkeypatch.setattr(solve, "_unbeaten", lambda *xs: seen.append(len(found := unbeaten(*xs))) or found)
    bits, layers = (1, 2, 3, 4, 8), []
    for n in range(80):
        a, b = 1 + 37 * n % 13, 1 + 53 * n % 17
        losses = {(k, v): a * 4.0**-k + b * 4.0**-v + 0.001 * ((k * v * n) % 7) for k in bits for v in bits}
        layers.append([Choice(k, v, 4096 * (k + v + 2) + 1000 * (k > 2), losses[k, v]) for k in bits for v in bits])
    for budget in (80 * 4096 * 5, 80 * 4096 * 7, 80 * 4096 * 11):
        loss, nbytes = total(layers, exact(layers, budget))
        assert nbytes <= budget and loss <= total(layers, greedy(layers, budget))[0]
    assert 25 < max(seen) < 2000


def test_choices_of_equal_merit_and_unrelated_sizes_are_refused_before_memory_ends(monkeypatch):
    monkeypatch.setattr(solve, "MOST", MOST >> 10)
    sizes = [(7919 * n * n + 104729 * n) % 1000003 for n in range(1, 200)]
    layers = [[Choice(2, 2, size, -size) for size in sizes[5 * i : 5 * i + 5]] for i in range(20)]
    with pytest.raises(ValueError, match="use the greedy solver"):
        exact(layers, 8_000_001)
    assert total(layers, greedy(layers, 8_000_001))[1] <= 8_000_001


@pytest.mark.parametrize("choices", [[], [Choice(2, 2, 4, float("nan"))], [Choice(2, 2, -1, 0.0)]])
def test_layers_that_cannot_be_weighed(choices):
    for solver in (exact, greedy):
        with pytest.raises(ValueError, match="layer 1 needs choices"):
            solver([[Choice(2, 2, 1, 1.0)], choices], 100)
