"""A saved cache that is well-formed but untrue is refused in one sentence, whatever in it is untrue."""

import copy
import hashlib
import io
import json
import os
import pickle
import re

import pytest
import torch
from artifacts import made
from models_tiny import tiny_llama
from safetensors import safe_open
from safetensors.torch import save_file

import kvist
from kvist.models.compat import cache_argument


@pytest.fixture
def saved(tmp_path):
    """A genuine file: 183 tokens."""
    model = tiny_llama()
    cache = kvist.Cache(model, "kivi recent=32")
    with torch.no_grad():
        model(torch.randint(1, 90, (1, 183)), **cache_argument(cache))
    cache.save(tmp_path / "it.kvist")
    return tmp_path / "it.kvist"


def edit(path, change=lambda header: None, tensors=lambda tensors: None) -> None:
    """The file by somebody else's hand, with a checksum that fits."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kvist"])
        arrays = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    changed = change(header)
    tensors(arrays)
    text = json.dumps(header if changed is None else changed)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(arrays[name].flatten().view(torch.uint8).numpy().data)
    save_file(arrays, path, {"kvist": text, "digest": digest.hexdigest()})


def refused(path) -> str:
    model = tiny_llama()
    hooks = len(model._forward_pre_hooks)
    with pytest.raises(ValueError) as caught:
        kvist.Cache.load(path, model)
    assert type(caught.value) is ValueError and len(model._forward_pre_hooks) == hooks
    sentence = str(caught.value)
    assert str(path) in sentence and sentence.isprintable() and len(sentence) < 1200
    return sentence


def test_an_edit_that_changes_nothing_is_read(saved):
    edit(saved)
    cache = kvist.Cache.load(saved, tiny_llama())
    assert cache.get_seq_length() == 183 and "183 tokens" in str(cache.report())


def frontiers(header, to: int) -> None:
    for layer in header["layers"]:
        for track in layer["tracks"]:
            track["states"] = [[to, to]]


def longer(header, to: int) -> None:
    """Every number that a longer cache has, but not its pages."""
    header["slots"], header["runs"] = to, [[[0, 0, to, 0]]]
    for layer in header["layers"]:
        layer["slots"], layer["lengths"] = to, [to]
    frontiers(header, to // 64 * 64)


def track(**changes):
    return lambda header: header["layers"][0]["tracks"][0].update(changes)


def layer(**changes):
    return lambda header: header["layers"][1].update(changes)


UNTRUE = {
    "frontiers": (lambda header: frontiers(header, 4992), "cannot be packed up to 4992"),
    "frontiers and lengths": (lambda header: longer(header, 5000), "pages for 4992 packed tokens"),
    "no group's end": (lambda header: frontiers(header, 33), "cannot be packed up to 33"),
    "fewer lengths": (layer(lengths=[]), "lengths: Tuple should have at least 1"),
    "more rows": (layer(lengths=[183, 183]), "different numbers of rows"),
    "another length": (layer(lengths=[182]), "182 tokens in 183 slots"),
    "other slots": (layer(slots=500), "which is not what was stored"),
    "a slot map that jumps": (layer(maps=[[[0, 0], [64, 4096]]]), "do not follow each other"),
    "a slot map that starts late": (layer(maps=[[[0, 64]]]), "slots for tokens that it does not hold"),
    "no slot map": (layer(maps=[[]]), "slots for tokens that it does not hold"),
    "a page of none": (track(tables=[[0, 9999]]), "pages for|not numbered one by one"),
    "a page twice": (track(tables=[[0, 0]]), "pages for"),
    "fewer pages": (track(tables=[[0]]), "1 pages for"),
    "a negative page": (track(tables=[[0, -1]]), "greater than or equal to 0"),
    "a pin": (track(pins=[[[3, 0]]]), "keeps tokens exact"),
    "a pin far away": (track(pins=[[[10**6, 0]]]), "keeps tokens exact"),
    "a small ring": (track(capacity=1), "rings of"),
    "a huge ring": (track(capacity=10**9), "rings of"),
    "clipped": (track(clipped=-1), "clipped: Input should be greater"),
    "type load": (layer(shape=[2, 32, 32, "load"]), "shape.3: Input should be 'float32'"),
    "another type": (layer(shape=[2, 32, 32, "float16"]), "does not hold torch.float16"),
    "no heads": (layer(shape=[0, 32, 32, "float32"]), "shape.0: Input should be greater than 0"),
    "another size": (layer(shape=[2, 64, 32, "float32"]), "does not hold"),
    "odd size": (layer(shape=[2, 33, 32, "float32"]), "head sizes must be multiples"),
    "a word": (layer(settled="yes"), "settled: Input should be a valid boolean"),
    "reserve": (lambda header: header.update(reserve=10**15), "reserve: Input should be less than"),
    "a fraction": (lambda header: header.update(reserve=1e15), "reserve: Input should be"),
    "negative": (lambda header: header.update(reserve=-1), "reserve: Input should be greater"),
    "runs": (lambda header: header.update(runs=[[[0, 5, 183, 0]]]), "do not follow each other"),
    "runs behind": (lambda header: header.update(runs=[[[9, 0, 183, 0]]]), "behind its 183 slots"),
    "fewer layers": (lambda header: header["layers"].pop() and None, "1 layers, the model 2"),
    "empty": (lambda header: {}, "Field required"),
    "a list": (lambda header: [1], "expected named fields, found"),
    "format": (lambda header: header.update(format=2), "is a cache of format 2, and this release"),
    "no recipe": (lambda header: header.pop("recipe") and None, "recipe: Field required"),
    "unknown": (lambda header: header.update(surprise=1), "surprise: Extra inputs"),
    "not a number": (lambda header: header.update(slots=float("nan")), "the number NaN"),
    "another recipe": (
        lambda header: header["recipe"]["layers"][0]["key"]["codec"]["levels"].update(bits=4),
        "which does not hold torch.uint8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTRUE)
def test_an_untrue_header(case, saved):
    change, words = UNTRUE[case]
    edit(saved, change)
    assert re.search(words, refused(saved)), refused(saved)


def test_a_deep_header(saved):
    def deep(header):
        for _ in range(200):
            header = {"a": header}
        return header

    edit(saved, deep)
    assert "nested deeper than 64" in refused(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.key.ring", "1.value.pages.scale"])
def test_numbers_that_are_not_finite(name, value, saved):
    edit(saved, tensors=lambda arrays: arrays[name].view(-1)[:1].fill_(value))
    assert "numbers that are not finite" in refused(saved)


def test_arrays_that_are_missing_or_of_no_layer(saved):
    edit(saved, tensors=lambda arrays: arrays.pop("0.key.ring"))
    assert "not the arrays that it should have: key.ring" in refused(saved)
    edit(saved, tensors=lambda arrays: arrays.update({"0.key.ring": torch.zeros(1), "9.x": torch.zeros(1)}))
    assert "key.ring is F32 (1,)" in refused(saved)


def test_outliers_stay_among_their_channels(tmp_path):
    model = tiny_llama()
    made(outliers=0.1).save(tmp_path / "fit")
    cache = kvist.Cache(model, f"kvquant artifact={tmp_path / 'fit'}")
    with torch.no_grad():
        model(torch.randint(1, 90, (1, 100)), **cache_argument(cache))
    path = tmp_path / "it.kvist"
    cache.save(path)
    edit(path, tensors=lambda arrays: arrays["0.key.pages.channel"].view(-1)[:1].fill_(32))
    assert "outliers lie beyond the 32 channels" in refused(path)
    cache.save(path)
    edit(path, tensors=lambda arrays: arrays["0.key.pages.ends"].view(-1)[:1].fill_(255))
    assert "not in order among" in refused(path)


def test_a_file_is_the_same_whatever_lay_in_free_memory(saved, tmp_path):
    """Room that holds no token is zeros: two saves of one cache are one file."""
    cache = kvist.Cache.load(saved, tiny_llama())
    cache.save(tmp_path / "again")
    with safe_open(saved, framework="pt") as one, safe_open(tmp_path / "again", framework="pt") as two:
        assert one.metadata() == two.metadata()  # which has a hash of all arrays


def test_what_cannot_be_read_is_not_saved(tmp_path):
    model = tiny_llama()
    cache = kvist.Cache(model, "exact")
    with torch.no_grad():
        model(torch.randint(1, 90, (1, 20)), **cache_argument(cache))
    cache.layers[0].key.exact.ring[0, 0, 3, 0] = torch.inf
    with pytest.raises(ValueError, match=r"not saved, .* not finite; a model that overflows"):
        cache.save(tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "it is a pipe"), (".", "it is a folder"), ("none", "No such file")):
        with pytest.raises(ValueError, match=f"expected a cache written by kvist at .*{words}"):
            kvist.Cache.load(tmp_path / name, tiny_llama())


def test_pickle_and_assignment_say_what_to_do_instead():
    cache = kvist.Cache(tiny_llama(), "int8")
    for save in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cache.save\(path\) writes it, kvist.Cache.load\(path, model\) reads it"):
            save(cache)
    assert len(copy.deepcopy(cache).layers) == 2
    for name in ("keys", "values"):
        with pytest.raises(AttributeError, match="are not assigned: update"):
            setattr(cache.layers[0], name, torch.zeros(1))


def test_values_beyond_fp16_are_counted_and_said():
    model = tiny_llama()
    cache = kvist.Cache(model, "kivi:2")
    keys = torch.randn(1, 2, 300, 32)
    cache.inner.rows.extend(1, 300, None)
    cache.layers[0].update(keys, keys)
    assert cache.report().clipped == 0 and "clipped" not in str(cache.report())
    keys[0, 0, 5, 3] = 1e6
    cache.reset()
    cache.inner.rows.extend(1, 300, None)
    cache.layers[0].update(keys, keys)
    assert cache.report().clipped == 2  # the scale of a group of keys, and of one of values
    assert str(cache.report()).count("clipped") == 1
