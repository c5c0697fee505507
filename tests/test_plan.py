"""The recipe: its JSON, its refusals, its sentence, and its bill worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist import methods
from kvist.coding import Codec, Grouping, Raw, Uniform
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Block, Immediate, KeepAll, Sliding
from kvist.types import Geometry, grown

SHAPE = Geometry(heads=2, key_dim=128, value_dim=128, dtype=torch.bfloat16)


def side(bits: int = 2, retention=None, along: str = "channels", size: int | None = 32) -> Side:
    return Side(codec=Codec(levels=Uniform(bits=bits), grouping=Grouping(along=along, size=size)), retention=retention)


@pytest.mark.parametrize(
    "text", [*methods.names(), "kivi k=3 v=16 sinks=4", "kvmix k=3,2,1 v=4,2,2", "hadamard:2 recent=64"]
)
def test_json_round_trip(text, tmp_path):
    recipe = methods.parse(text)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe
    assert hash(recipe) == hash(Recipe.load(tmp_path / "r.json"))


def test_the_sentence_says_what_each_side_does():
    text = str(methods.parse("kivi k=2 v=4 sinks=3"))
    for words in (
        "kivi: keys: 2-bit uniform, minmax per 32 along tokens",
        "block (size 128), 3 sinks",
        "values: 4-bit",
        "sliding",
    ):
        assert words in text
    assert str(methods.get("exact")) == "exact: keys: exact; exact: all tokens; values: exact; exact: all tokens"
    assert "layer 1: " in str(methods.parse("kvmix k=3,2"))


def test_sides_that_cannot_share_a_layer_are_refused():
    with pytest.raises(ValueError, match="same number of sinks"):
        LayerPlan(key=side(retention=Block(size=32, sinks=1)), value=side(retention=Block(size=32)))
    with pytest.raises(ValueError, match="neither"):
        LayerPlan(key=side(retention=Block(size=32)), value=side(retention=KeepAll()))


def test_layers_must_match_the_model():
    recipe = methods.parse("kvmix k=3,2")
    assert len(methods.get("kivi").for_layers(5)) == 5
    with pytest.raises(ValueError) as caught:
        recipe.for_layers(3)
    assert "describes 2 layers but the model has 3" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_page_holds_whole_groups_and_is_the_same_for_all_layers(group):
    recipe = methods.get("kivi", group=group)
    assert recipe.page == max(64, group)
    mixed = Recipe(name="mixed", layers=recipe.layers + methods.get("int8").layers)
    assert mixed.page == recipe.page


def test_the_bill_of_int8_by_hand():
    """4,096 tokens, room for them reserved. 32 wait in the ring, 64 pages of 64; a scale and an offset per token."""
    heads, dim, tokens = 2, 128, 4096
    codes, numbers = heads * tokens * dim, heads * tokens * 2
    ring, table = 32 * heads * dim * 2, 64 * 4
    bill = methods.get("int8").bill(SHAPE, 1, tokens, reserve=tokens)
    assert dict(bill) == {
        "codes": 2 * codes, "scale": 2 * numbers, "offset": 2 * numbers, "recent": 2 * ring, "tables": 2 * table
    }  # fmt: skip
    each = 8 * (codes + 2 * numbers + ring + table) / (heads * tokens * dim)
    assert methods.get("int8").bits_per_element(SHAPE, 1, tokens) == pytest.approx(each, rel=1e-12)
    assert methods.get("int8").bits_per_element(SHAPE, 7, tokens) == pytest.approx(each, rel=1e-12)
    assert each == pytest.approx(8 + 32 / 128 + 32 * 16 / 4096 + 256 * 8 / (2 * 4096 * 128))


def test_the_bill_of_kivi_by_hand():
    """Rings: the larger of keys 127 + 31 + 32 and values 128 + 32, so 190. 3.0 bits for each of 131,072 tokens."""
    heads, dim, tokens = 2, 128, 131072
    stored = 3.0 / 8 * heads * dim * tokens
    ring, table = 190 * heads * dim * 2, tokens // 64 * 4
    bill = methods.get("kivi", bits=2).bill(SHAPE, 1, tokens, reserve=tokens)
    assert bill["codes"] + bill["scale"] + bill["offset"] == 2 * stored
    assert bill["recent"] == 2 * ring and bill["tables"] == 2 * table
    assert methods.get("kivi").bits_per_element(SHAPE, 1, tokens) == 8 * (stored + ring + table) / (
        heads * dim * tokens
    )


def test_exact_tokens_take_their_own_size():
    """Nothing is packed: the rings hold the whole length, in the type of the model."""
    for dtype, bits in ((torch.bfloat16, 16.0), (torch.float32, 32.0)):
        shape = Geometry(2, 128, 128, dtype)
        assert methods.get("exact").bits_per_element(shape, 3, 1000) == bits


def test_a_short_last_group_is_on_the_bill():
    shape = Geometry(heads=1, key_dim=80, value_dim=80, dtype=torch.bfloat16)
    bill = methods.get("int4", group=32).bill(shape, 1, 4096, reserve=4096)
    assert bill["scale"] == bill["offset"] == 2 * 4096 * 3 * 2
    assert bill["codes"] == 2 * 4096 * 40


def test_kvmix_layers_are_billed_one_by_one():
    total = methods.parse("kvmix k=3,2 v=4,1").bill(SHAPE, 2, 5000, batch=3)
    alone = [methods.get("kvmix", k=k, v=v).bill(SHAPE, 1, 5000, batch=3) for k, v in ((3, 4), (2, 1))]
    assert total == alone[0] + alone[1]


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 10**6), step=st.sampled_from([8, 16, 64]))
def test_capacities_grow_by_steps(n, step):
    capacity = grown(n, step)
    assert capacity >= n and capacity % step == 0
    assert capacity == grown(capacity, step), "what is given is enough for itself"
    if n > 8 * step:
        assert capacity <= 1.25 * n + 2 * step


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 5000), granule=st.sampled_from([8, 32, 64]), size=st.integers(1, 200), sinks=st.integers(0, 9)
)
def test_the_frontier_after_one_update(length, granule, size, sinks):
    """Whole groups, never the last 32 tokens, never a sink, and nothing of a short update."""
    for rule in (Block(size=size, sinks=sinks), Sliding(size=size, sinks=sinks), Immediate(sinks=sinks)):
        frontier = side(retention=rule, along="tokens", size=granule).frontier_after(length)
        assert frontier % granule == 0 and 0 <= frontier <= max(0, length - sinks - 32)
        if length <= 32:
            assert frontier == 0


def test_an_exact_side_has_no_granule():
    codec = Codec(levels=Raw(), grouping=Grouping(along="tokens", size=64))
    assert codec.granule == 1
