"""Widths per layer, for every method that has them: one syntax, refusals by name, and the bytes of a mixed cache."""

import json
import re
from collections import Counter

import pytest
import torch
from artifacts import made
from models_tiny import tiny_llama, tokens, unpadded
from typer.testing import CliRunner

import kvist
from kvist import methods
from kvist.allocation import Allocation
from kvist.artifact import Artifact
from kvist.cli.app import app
from kvist.demo import model as bundled
from kvist.methods.kvquant import recipe
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.types import Geometry

MIXED = Allocation(k=(4, 2, 4, 2), v=(2, 2, 4, 4))
TAKE = [name for name in methods.names() if "allocation" in methods.defaults(name)]


def test_every_method_with_k_and_v_takes_one():
    assert {"kivi", "hadamard", "kvmix", "kvquant", "logquant", "streaming"} <= set(TAKE)
    assert not {"exact", "int4", "int8"} & set(TAKE)


@pytest.mark.parametrize("name", TAKE)
def test_each_layer_is_what_the_method_makes_of_its_widths(name, tmp_path):
    found = methods.get(name, allocation=MIXED)
    assert found.name == name and found.paper == methods.get(name).paper and found.model is None
    for plan, k, v in zip(found.for_layers(4), MIXED.k, MIXED.v, strict=True):
        assert (plan,) == methods.get(name, k=k, v=v).layers
        assert [side.codec.levels.bits for side in plan.sides] == [k, v]
    path = tmp_path / "widths of mine.json"
    MIXED.save(path)
    assert methods.get(name, allocation=path) == methods.get(name, allocation=str(path)) == found
    assert methods.parse(f"{name} 'allocation={path}'") == methods.parse(name, allocation=path) == found
    assert methods.parse(f"{name} k=4,2,4,2 v=2,2,4,4") == found
    assert found.needs == methods.get(name).needs


def test_an_allocation_may_be_what_its_file_holds():
    wanted = methods.get("kivi", allocation=MIXED)
    assert methods.get("kivi", allocation={"k": [4, 2, 4, 2], "v": [2, 2, 4, 4]}) == wanted
    assert methods.get("kivi", allocation=None) == methods.get("kivi")
    for wrong, words in (
        ({}, "k: field required"),
        ({"k": [2, True], "v": [2, 2]}, "k: input should be a valid integer, found True"),
        (5, "expected an Allocation, its JSON file or .*found 5"),
        ([3, 2], r"expected an Allocation, .*found \[3, 2\]"),
    ):
        with pytest.raises(ValueError, match=f"kivi: {words}"):
            methods.get("kivi", allocation=wrong)


@pytest.mark.parametrize("name", ["exact", "int4", "int8"])
def test_a_method_without_widths_refuses_by_name(name):
    with pytest.raises(ValueError, match=f"{name} takes no allocation: .*k and v"):
        methods.get(name, allocation=MIXED)


def test_one_side_alone_may_differ_and_one_layer_is_for_all():
    assert methods.parse("kivi:4 k=3,2") == methods.get("kivi", allocation=Allocation.of((3, 2), 4))
    assert methods.get("kivi", allocation=Allocation.of(3, 2)) == methods.parse("kivi k=3 v=2")


def test_an_allocation_of_another_model_is_refused():
    model = tiny_llama()
    made_for = describe(model).identity
    allocation = Allocation(k=(3, 2), v=(2, 4), model=made_for)
    for name in ("kivi", "kvmix"):
        cache = kvist.Cache(model, name, allocation=allocation)
        assert cache.recipe.model == made_for and cache.recipe == methods.get(name, allocation=allocation)
    for other, words in (
        (tiny_llama(layers=3), "2 layers, this model has 3 layers"),
        (tiny_llama(dim=40), "heads of 32, this model has heads of 40"),
    ):
        with pytest.raises(ValueError, match=f"kivi does not fit: it was made for .*{words}; .*profile") as caught:
            kvist.Cache(other, "kivi", allocation=allocation)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="describes 2 layers but the model has 3"):
        kvist.Cache(tiny_llama(layers=3), "kivi", allocation=Allocation.of((3, 2), 2))


@pytest.fixture
def places(tmp_path):
    """Artefacts of 2, 3 and 4 bits for the tiny model."""
    for bits in (2, 3, 4):
        made(bits=bits).save(tmp_path / str(bits))
    return ",".join(str(tmp_path / str(bits)) for bits in (2, 3, 4))


def test_each_side_of_each_layer_is_from_the_artefact_of_its_width(places):
    two, three, four = (Artifact.load(place) for place in places.split(","))
    found = methods.get("kvquant", artifact=places, k=(3, 2), v=(4, 3))
    assert found.model == two.model and not found.needs
    assert found.layers[0].key == recipe(three).layers[0].key and found.layers[0].value == recipe(four).layers[0].value
    assert found.layers[1].key == recipe(two).layers[1].key and found.layers[1].value == recipe(three).layers[1].value
    same = Allocation(k=(3, 2), v=(4, 3), model=two.model)
    assert methods.get("kvquant", artifact=places, allocation=same) == found
    cache = kvist.Cache(tiny_llama(), found)
    with torch.no_grad():
        tiny_llama()(**unpadded(2, 100), **cache_argument(cache))
    bill = found.bill(Geometry(2, 32, 32, torch.float32), 2, 100, 2)
    assert cache.report().nbytes == bill.total()


def test_one_width_for_all_layers(places):
    two, three, four = (Artifact.load(place) for place in places.split(","))
    assert methods.parse(f"kvquant:3 artifact={places}") == recipe(three)
    assert methods.parse(f"kvquant k=4 v=2 artifact={places} recent=8") == recipe(four, 8, None, two)
    assert methods.parse(f"kvquant artifact={places.split(',')[0]}") == recipe(two)
    assert methods.parse(f"kvquant artifact={places.split(',')[0]} k=2 v=2") == recipe(two)


def test_a_folder_may_have_a_comma_in_its_name(tmp_path):
    made().save(tmp_path / "a,b")
    assert methods.get("kvquant", artifact=tmp_path / "a,b") == recipe(Artifact.load(tmp_path / "a,b"))


def test_widths_that_no_artefact_has(places):
    with pytest.raises(ValueError, match=r"layer 1, k=8 v=3: .*2, 3, 4 bits, found k=8"):
        methods.get("kvquant", artifact=places, k=(3, 8), v=3)
    with pytest.raises(ValueError, match="2, 3, 4 bits; choose by bits="):
        methods.get("kvquant", artifact=places)
    with pytest.raises(ValueError, match="3 bits, found v=2"):
        methods.get("kvquant", artifact=places.split(",")[1], k=3, v=2)
    with pytest.raises(ValueError, match="the artefact has 2 layers, the allocation 3"):
        methods.get("kvquant", artifact=places, k=(3, 2, 2), v=3)
    other = describe(tiny_llama(dim=40)).identity
    with pytest.raises(ValueError, match="made for llama: heads of 40"):
        methods.get("kvquant", artifact=places, allocation=Allocation(k=(3, 2), v=(2, 2), model=other))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outliers": 0.1}, "outliers, 0.05 and 0.1"),
        ({"sinks": 3}, "sinks, 1 and 3"),
        ({"keys": "post-rope"}, "differ in rotary"),
        ({"keys": "post-rope", "key_axis": "token"}, "differ in rotary"),
        ({"cap": "none", "slots": 4}, "cap, token and none"),
        ({"model": tiny_llama(layers=3)}, r"model \(layers\), 2 and 3"),
    ],
)
def test_artefacts_that_do_not_belong_together(changes, words, tmp_path):
    made(bits=2).save(tmp_path / "a")
    made(bits=3, **changes).save(tmp_path / "b")
    with pytest.raises(ValueError, match=words) as caught:
        methods.get("kvquant", artifact=f"{tmp_path / 'a'},{tmp_path / 'b'}", k=2, v=3)
    assert "\n" not in str(caught.value)
    made(bits=2, levels="int", qnorm=True, sensitivity="none").save(tmp_path / "c")
    with pytest.raises(ValueError, match="several artefacts of 2 bits"):
        methods.get("kvquant", artifact=f"{tmp_path / 'a'},{tmp_path / 'c'}", k=2, v=2)


def test_the_bundled_artefacts_serve_any_mixture():
    found = bundled.recipe("kvquant k=4,3,2,2,3,4 v=2")
    assert not found.needs and [plan.key.codec.levels.bits for plan in found.layers] == [4, 3, 2, 2, 3, 4]


FOUR = {"k": (1, 2, 3, 4), "v": (4, 3, 1, 2)}


def test_a_mixed_cache_takes_what_its_bill_says_at_every_step_of_attached_decoding():
    """Layers of 1, 2, 3 and 4 bits, keys and values different, room reserved: equal to the byte, item by item."""
    model, shape, batch, reserve = tiny_llama(layers=4, dim=64), Geometry(2, 64, 64, torch.float32), 2, 192
    cache = kvist.Cache(model, "kivi", reserve=reserve, recent=32, **FOUR)
    with torch.no_grad(), kvist.attach(model):
        for count in (100, *[1] * 80):
            mask = torch.ones(batch, cache.get_seq_length() + count)
            model(tokens(batch, count), attention_mask=mask, **cache_argument(cache))
            bill = cache.recipe.bill(shape, 4, cache.get_seq_length(), batch, reserve)
            assert dict(bill) == {item: n for item, n in cache.report().allocated.items() if n}
    per_token = Counter()
    for k, v in zip(FOUR["k"], FOUR["v"], strict=True):
        per_token += Counter(codes=64 * (k + v) // 8, scale=2 * 64 // 32 * 2, offset=2 * 64 // 32 * 2)
    assert {item: bill[item] for item in per_token} == {item: n * 2 * batch * reserve for item, n in per_token.items()}


@pytest.mark.parametrize("ratio_of", ["waiting", "context"])
def test_a_mixed_kvmix_cache(ratio_of):
    """Windows of each width's own ratio: equal after the prompt; pages stay equal while the windows move."""
    model, shape = tiny_llama(layers=4, dim=64), Geometry(2, 64, 64, torch.float32)
    cache = kvist.Cache(model, "kvmix", reserve=640, ratio_of=ratio_of, **FOUR)
    with torch.no_grad(), kvist.attach(model):
        model(**unpadded(1, 500), **cache_argument(cache))
        bill = cache.recipe.bill(shape, 4, 500, 1, 640)
        assert dict(bill) == {item: n for item, n in cache.report().allocated.items() if n}
        for _ in range(70):
            model(tokens(1, 1), **cache_argument(cache))
    now = cache.report().allocated
    assert {item: now[item] for item in now if item != "recent"} == {
        item: bill[item] for item in now if item != "recent"
    }
    if ratio_of == "waiting":
        assert now["recent"] <= bill["recent"]
    else:
        assert now["recent"] == cache.recipe.bill(shape, 4, 570, 1, 640)["recent"]


def test_a_three_bit_layer_stores_four_bits_per_element():
    """Measured from the pages of a living cache: codes, scales and offsets of 3-bit sides at groups of 32."""
    model = tiny_llama(layers=4, dim=64)
    cache = kvist.Cache(model, "kvmix", reserve=256, **FOUR)
    with torch.no_grad():
        model(**unpadded(1, 256), **cache_argument(cache))
    for layer, k, v in zip(cache.inner.ours, FOUR["k"], FOUR["v"], strict=True):
        for track, bits in ((layer.key, k), (layer.value, v)):
            nbytes = sum(array.nbytes for array in track.pool.arrays.values())
            assert 8 * nbytes / (256 * 2 * 64) == bits + 1.0


def run(*words: str):
    return CliRunner().invoke(app, ["run", str(bundled.FOLDER), "-p", "On the road", "--max-new-tokens", "2", *words])


def test_run_with_an_allocation(tmp_path):
    path = tmp_path / "alloc.json"
    table = Allocation(k=(3, 2, 2, 2, 2, 3), v=(4, 2, 2, 2, 2, 1))
    table.save(path)
    for words, wanted in (((), "kvmix"), (("-m", "kivi recent=64"), "kivi recent=64")):
        result = run("--allocation", str(path), "--json", "--device", "cpu", *words)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["recipe"] == methods.parse(wanted, allocation=table).model_dump(mode="json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--allocation", "{}/no.json"), "expected an allocation's JSON file at .*no.json: No such file"),
        (("--allocation", "{}/a.json", "-m", "kivi:2"), "kivi: give either an allocation or bits=, not both"),
        (("--allocation", "{}/a.json", "-m", "int4"), "int4 takes no allocation"),
        (("--allocation", "{}/a.json", "-m", "{}/r.json"), "a recipe's file takes no options, found 'allocation'"),
        (("--allocation", "{}/a.json"), "describes 2 layers but the model has 6"),
    ],
)
def test_misuse_is_one_sentence(words, said, tmp_path):
    Allocation.of((3, 2), 2).save(tmp_path / "a.json")
    result = run(*(word.format(tmp_path) for word in words))
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("kvist: ") and re.search(said, line)


def test_calibration_of_two_widths_at_once_is_refused():
    result = CliRunner().invoke(
        app, ["calibrate", str(bundled.FOLDER), "--data", "x", "--method", "kvquant k=3 v=2", "--out", "y"]
    )
    assert result.exit_code == 2 and "one width; calibrate once for each" in result.stderr
