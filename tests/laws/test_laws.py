"""Laws that every registered method obeys, on tracks alone: no model, random keys and values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist import methods
from kvist.methods.parts import per_token
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Block, Gather, Immediate, KeepAll, LogSparse, Ratio, Share, Sliding, Streaming
from kvist.testing import CASES, LAWS, errors_fall, laws, recipe


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("text", CASES)
def test_laws(text, law):
    law(recipe(text))


WIDTHS = {
    "kivi": [{"bits": b} for b in (1, 2, 3, 4, 8, 16)],
    "kvmix": [{"k": b, "v": b} for b in (1, 2, 3, 4)],
    "hadamard": [{"bits": b} for b in (2, 4, 8)],
    "int": [("int4", {}), ("int8", {}), ("exact", {})],
} | {name: [{"bits": b} for b in (2, 4)] for name in methods.names() if "streaming" in name or "logquant" in name}


@pytest.mark.parametrize("outliers", [False, True], ids=["gaussian", "outliers"])
@pytest.mark.parametrize("name", WIDTHS)
def test_error_falls_when_bits_rise(name, outliers):
    errors_fall([methods.get(o[0]) if name == "int" else methods.get(name, **o) for o in WIDTHS[name]], outliers)


def test_laws_catch_what_breaks_them():
    """A reason that is none, widths in the wrong order, and a frontier that moves with the cut without a word."""
    kivi = recipe("kivi:2 recent=32")
    with pytest.raises(AssertionError, match="do not fall"):
        errors_fall([recipe("kivi:4 recent=32"), kivi])
    with pytest.raises(AssertionError, match="is off by"):
        errors_fall([recipe("kivi:1 recent=32")])
    mute = _Mute.model_validate(recipe("kvmix k=3 v=4").model_dump())
    with pytest.raises(AssertionError, match="are packed"):
        laws.same_bytes_however_it_is_cut(mute)
    plain = LayerPlan(
        key=Side(codec=per_token(4), retention=Immediate()), value=Side(codec=per_token(4), retention=Immediate())
    )
    with pytest.raises(AssertionError, match="states a reason"):
        laws.reasons_are_needed(_Talker(name="talker", layers=(plan_ := plain,)))
    assert plan_.packs


class _Mute(Recipe):
    """Says nothing of how it is cut."""

    @property
    def chunking(self) -> None:
        return None


class _Talker(Recipe):
    """Finds a reason where there is none."""

    @property
    def chunking(self) -> str:
        return "because"


@pytest.mark.parametrize("text", CASES)
def test_a_file_is_the_recipe(text, tmp_path):
    plan = recipe(text)
    plan.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == plan == methods.parse(str(tmp_path / "recipe.json"))


def test_every_registered_method_is_among_the_cases():
    assert {text.split()[0].split(":")[0] for text in CASES} == set(methods.names())


RULES = st.one_of(
    st.just(KeepAll()),
    st.just(Immediate()),
    st.builds(Block, size=st.integers(1, 70)),
    st.builds(Gather, size=st.integers(1, 70)),
    st.builds(Sliding, size=st.integers(1, 70)),
    st.builds(Streaming, window=st.integers(1, 50)),
    st.builds(LogSparse, window=st.integers(1, 50)),
    st.builds(Ratio, ratio=st.floats(0, 0.9), group=st.sampled_from([1, 32, 64])),
    st.builds(Share, ratio=st.floats(0, 1, exclude_max=True), group=st.sampled_from([1, 32, 64])),
)


@given(RULES, st.lists(st.integers(0, 90), min_size=1, max_size=30))
def test_frontier_never_retreats_and_pins_lie_behind_it(rule, steps):
    frontier = length = 0
    pins: set[int] = set()
    for i, step in enumerate(steps):
        length += step
        new = rule.advance(frontier, length, i == 0)
        assert frontier <= new <= length
        if rule.most is not None:
            assert length - new <= rule.most
        kept = rule.pins(new)
        assert list(kept) == sorted(set(kept)) and all(0 <= p < new for p in kept) and len(kept) <= rule.most_pins
        assert {p for p in kept if p < frontier} <= pins, "a pin that was let go came back"
        frontier, pins = new, set(kept)
