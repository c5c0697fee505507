"""The one syntax for a method, and its refusals: one sentence each, with the nearest name."""

import json
from pathlib import Path

import pytest

from kvist import methods
from kvist.plan import Recipe

NAMES = [
    "exact",
    "hadamard",
    "int4",
    "int8",
    "kivi",
    "kvmix",
    "logquant",
    "partial-logquant",
    "partial-streaming",
    "streaming",
]


def test_every_method_is_found_and_says_what_it_is():
    assert set(NAMES) <= set(methods.names())
    assert methods.names() == sorted(methods.names())
    for name in methods.names():
        recipe = methods.get(name)
        assert recipe.name == name and recipe.paper
        assert methods.entry(name).__doc__


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("kivi", "kivi", {}),
        ("kivi:4", "kivi", {"bits": 4}),
        ("kivi k=2 v=4 group=32 recent=128", "kivi", {"k": 2, "v": 4, "group": 32, "recent": 128}),
        ("  kivi:2   recent=64 ", "kivi", {"bits": 2, "recent": 64}),
        ("kivi values=block", "kivi", {"values": "block"}),
        ("kvmix k=3,2 v=4,2 ratio=0.25", "kvmix", {"k": (3, 2), "v": (4, 2), "ratio": 0.25}),
        ("kvmix ratio-of=context ratios=reference", "kvmix", {"ratio_of": "context", "ratios": "reference"}),
        ("hadamard:2 k=3,4,2", "hadamard", {"k": [3, 4, 2], "v": (2, 2, 2)}),
        ("partial-logquant:4 budget=128", "partial-logquant", {"bits": 4, "budget": 128}),
        ("int4 group=32", "int4", {"group": 32}),
    ],
)
def test_text_and_keywords_mean_the_same(text, name, options):
    assert methods.parse(text) == methods.get(name, **options) == methods.resolve(text)
    assert methods.resolve(name, **options) == methods.parse(text)


def test_a_recipe_may_come_from_a_file(tmp_path):
    recipe, path = methods.parse("kivi k=2 v=4"), tmp_path / "recipe.json"
    recipe.save(path)
    assert methods.parse(str(path)) == methods.resolve(path) == methods.resolve(str(path)) == recipe
    with pytest.raises(ValueError, match="takes no options"):
        methods.parse(f"{path} k=2")


def test_a_recipe_passes_through_and_takes_no_options():
    recipe = methods.get("kivi")
    assert methods.resolve(recipe) is recipe
    with pytest.raises(ValueError, match="takes no options"):
        methods.resolve(recipe, bits=4)


def test_text_takes_keywords_beside_its_own_options(tmp_path):
    assert methods.resolve("kivi recent=64", k=3) == methods.parse("kivi recent=64 k=3")
    with pytest.raises(ValueError, match="recent of kivi is given twice"):
        methods.parse("kivi recent=64", recent=32)
    path = tmp_path / "recipe.json"
    methods.get("kivi").save(path)
    for method in (path, str(path)):
        with pytest.raises(ValueError, match="takes no options"):
            methods.resolve(method, k=3)


REFUSED = [
    ("kiwi", "did you mean 'kivi'?"),
    ("logquand:2", "did you mean 'logquant'?"),
    ("partial_streaming", "did you mean 'partial-streaming'?"),
    ("qqqqqqq", "no method is called 'qqqqqqq'; `kvist methods` lists them"),
    ("", "found nothing"),
    ("kivi recents=64", "did you mean 'recent'?"),
    ("kivi grop=32", "did you mean 'group'?"),
    ("exact bits=2", "exact has no option 'bits'"),
    ("kivi recent", "expected option=value"),
    ("kivi recent=", "expected option=value"),
    ("kivi recent=many", "recent must be a number"),
    ("kivi recent=16", "the window (16 tokens) is shorter than the group (32)"),
    ("kivi group=64 recent=32", "use at least 64"),
    ("kivi group=48", "group must be 32, 64 or 128, found 48"),
    ("kivi:5", "bits must be one of 1, 2, 3, 4, 8 or 16 (exact), found 5"),
    ("kivi:-2", "bits must be one of"),
    ("kivi:2.5", "bits must be one of"),
    ("kivi values=both", "values must be 'sliding' (as published) or 'block', found 'both'"),
    ("kivi sinks=-1", "greater than or equal to 0"),
    ("kivi recent=100.5", "integer"),
    ("logquant window=16", "the window (16 tokens) is shorter than the group (32)"),
    ("streaming budget=20", "shorter than the group"),
    ("streaming budget=2", "greater than 0"),
    ("kvmix ratio=1.5", "less than 1"),
    ("kvmix k=3,2 v=4,2,2", "as many layers"),
    ("kvmix k=5", "bits must be one of"),
    ("kvmix ratios=ours", "ratios must be 'paper' or 'reference' (the published code's), found 'ours'"),
    ("kvmix ratio-of=all", "ratio-of must be 'waiting' (as published) or 'context', found 'all'"),
    ("kvmix ratio-of=context ratio=1", "less than 1"),
    ("kivi k=5,2", "found 5 in k of layer 0"),
    ("kivi k=2.5 v=3,2", "k: input should be a valid integer"),
    ("kivi allocation=x.json k=2", "either an allocation or k="),
    ("kivi:2 allocation=x.json", "either an allocation or bits="),
    ("kivi allocation=absent.json", "expected an allocation's JSON file at absent.json: No such file"),
    ("exact allocation=x.json", "exact takes no allocation"),
    ("kivi alocation=x.json", "did you mean 'allocation'?"),
    ("logquant k=2,3", "logquant: layer 1, k=3 v=2: bits must be 2 or 4 (or 16, exact), found 3"),
    ("kvquant k=3,2", "v is missing"),
    ("kvquant k=3,8 v=2", "kvquant: layer 1, k=8 v=2: bits"),
    ("hadamard group=12", "multiple of 8"),
    ("absent.json", "expected a recipe's JSON file at absent.json"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_refusals_are_one_sentence_that_says_what_is_wrong(text, words):
    with pytest.raises(ValueError) as caught:
        methods.parse(text)
    message = str(caught.value)
    assert words in message
    assert type(caught.value) is ValueError, "no library's own report of fields"
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"name": "x"}',
        '{"name": "x", "layers": []}',
        json.dumps({"name": "x", "layers": [{"key": 1}]}),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is not a recipe|expected a recipe's JSON file") as caught:
        methods.parse(str(path))
    assert "\n" not in str(caught.value) and type(caught.value) is ValueError


def test_a_recipe_from_another_format_is_refused(tmp_path):
    path, data = tmp_path / "recipe.json", json.loads(methods.get("kivi").model_dump_json())
    path.write_text(json.dumps(data | {"format": 2}))
    with pytest.raises(ValueError, match="format"):
        Recipe.load(path)
    path.write_text(json.dumps(data | {"surprise": 2}))
    with pytest.raises(ValueError, match="surprise"):
        Recipe.load(Path(path))
