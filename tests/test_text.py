"""Texts from files, folders and a hub that is played; windows in order and at random."""

import logging
import lzma
import sys
from types import SimpleNamespace

import pytest
import torch

from kvist.demo.model import FOLDER
from kvist.text import HUB, digest, encode, sample, texts, windows


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def story(words: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    names = ["river", "house", "walked", "the", "morning,", "a", "letter", "of", "winter.", "said", "Anna", "7"]
    return " ".join(names[i] for i in torch.randint(len(names), (words,), generator=generator).tolist())


@pytest.fixture
def folder(tmp_path):
    """A folder of data: wikitext2 with two splits, novels with a compressed one."""
    for place in ("eval/wikitext2", "train"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "eval/wikitext2/test.txt").write_text("one\n\ntwo")
    (tmp_path / "eval/wikitext2/valid.txt").write_text("valid")
    (tmp_path / "eval/novels.txt").write_text("first<|endoftext|>\n<|endoftext|>second — é")
    (tmp_path / "train/novels.txt.xz").write_bytes(lzma.compress(b"x<|endoftext|>y<|endoftext|>z"))
    return tmp_path


def test_names_in_a_folder(folder):
    assert texts("wikitext2", folder) == ["one\n\ntwo"]
    assert texts("wikitext2", folder, "valid") == ["valid"]
    assert texts("novels", str(folder)) == ["first", "second — é"]
    assert texts("novels", folder, "train") == ["x", "y", "z"]
    with pytest.raises(ValueError, match=r"expected train/wikitext2.txt.xz or train/wikitext2.txt or .* found none"):
        texts("wikitext2", folder, "train")  # never another split instead


def test_files(folder):
    assert texts(str(folder / "eval/novels.txt")) == ["first", "second — é"]
    assert texts(str(folder / "train/novels.txt.xz")) == ["x", "y", "z"]
    (folder / "bad.txt.xz").write_bytes(b"not xz")
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    (folder / "empty.txt").write_text(" \n<|endoftext|>\n")
    for name, words in (
        ("bad.txt.xz", "no xz file"),
        ("bad.txt", "UTF-8"),
        ("no.txt", "No such"),
        ("empty.txt", "no text"),
    ):
        with pytest.raises(ValueError, match=words):
            texts(str(folder / name))
    with pytest.raises(ValueError, match="split is one of"):
        texts("novels", folder, "dev")
    with pytest.raises(ValueError, match="need --data-dir"):
        texts("novels")


def test_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        texts("wikitext2")
    asked = []

    class Rows(list):
        def take(self, n):
            return Rows(self[:n])

    def load(path, **arguments):
        asked.append((path, arguments))
        if path == "allenai/c4":
            return Rows({"text": f"page {i}"} for i in range(5_000))
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert texts("c4") == [f"page {i}" for i in range(1_100)] and asked[0][1]["streaming"]
    with pytest.raises(ValueError, match=r"cannot be fetched .*: no network; give a text file"):
        texts("wikitext2", split="train")
    assert asked[1] == ("Salesforce/wikitext", {**HUB["wikitext2", "train"][1], "streaming": False})


def test_digest():
    assert digest(["a", "b"]) == digest(["a", "b"]) != digest(["ab"])
    assert digest(["a", "b"]) != digest(["b", "a"]) and len(digest(["a"])) == 16


def test_windows_are_the_joined_text_in_order(tokenizer):
    documents = [story(300, 1), story(500, 2)]
    whole = tokenizer("\n\n".join(documents))["input_ids"]
    found = windows(tokenizer, documents, 128)
    assert found.shape == (len(whole) // 128, 128) and found.dtype == torch.int64
    assert found.flatten().tolist() == whole[: found.numel()]


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_the_first_windows_need_not_the_whole_text(tokenizer, most):
    documents = [story(9_000, 3)]
    every = windows(tokenizer, documents, 64)
    assert torch.equal(windows(tokenizer, documents, 64, most), every[:most])


def test_tokens_that_are_few_characters_are_found_all_the_same(tokenizer):
    # here a token takes more characters than expected: the first stretch is too short
    documents = [(" " * 80 + "word") * 600]
    every = windows(tokenizer, documents, 64)
    assert len(every) > 2 and torch.equal(windows(tokenizer, documents, 64, 2), every[:2])


def test_samples_are_of_the_text_and_do_not_overlap(tokenizer):
    documents = [story(6_000, seed) for seed in range(4)]
    found = sample(tokenizer, documents, 12, 64, seed=5)
    assert found.shape == (12, 64) and found.dtype == torch.int64
    text, places = "\n\n".join(documents), []
    for row in found:
        words = tokenizer.decode(row).strip()
        places.append(text.find(words))
        assert places[-1] >= 0 and text.count(words) == 1
    gaps = torch.tensor(sorted(places)).diff()
    assert gaps.min() >= 64 * 8 - 20
    assert torch.equal(found, sample(tokenizer, documents, 12, 64, seed=5))
    assert not torch.equal(found, sample(tokenizer, documents, 12, 64, seed=6))


def test_only_what_is_drawn_is_tokenised(tokenizer):
    given = []

    def watched(text, **options):
        given.append(len(text))
        return tokenizer(text, **options)

    documents = [story(40_000)]
    sample(watched, documents, 3, 64)
    assert len(given) == 3 and sum(given) < len(documents[0]) / 50


def test_a_short_text_gives_all_it_has_first(tokenizer):
    text = story(400, 7)
    ids = encode(tokenizer, text)
    whole = len(ids) // 64
    starts = {tuple(ids[start : start + 64]): start for start in range(len(ids) - 63)}
    found = [starts[tuple(row)] for row in sample(tokenizer, [text], whole + 3, 64).tolist()]
    assert sorted(found[:whole]) == [64 * i for i in range(whole)] and len(found) == whole + 3
    # more than the long stretches hold, fewer than there are windows
    few = [starts[tuple(row)] for row in sample(tokenizer, [text], whole - 1, 64).tolist()]
    assert len(set(few)) == whole - 1 and all(start % 64 == 0 for start in few)


def test_nothing_is_said_about_lengths(tokenizer, caplog):
    before = tokenizer.model_max_length
    tokenizer.model_max_length = 16
    try:
        with caplog.at_level(logging.WARNING):
            logging.getLogger("transformers").propagate = True
            windows(tokenizer, [story(300)], 32)
            sample(tokenizer, [story(300)], 2, 32)
    finally:
        tokenizer.model_max_length = before
        logging.getLogger("transformers").propagate = False
    assert not caplog.records


def test_refusals(tokenizer):
    for make in (lambda n: windows(tokenizer, ["short"], n), lambda n: sample(tokenizer, ["short"], 1, n)):
        with pytest.raises(ValueError, match="smaller --seqlen"):
            make(64)
        with pytest.raises(ValueError, match="at least 2 tokens"):
            make(1)
    with pytest.raises(ValueError, match="at least 1 window"):
        sample(tokenizer, ["short"], 0, 4)
