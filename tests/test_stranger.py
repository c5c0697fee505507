"""The room that opens strangers' files: what is no plain file, too long, too deep or no text is a reason, at once."""

import json
import lzma
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist import stranger
from kvist.allocation import Allocation
from kvist.plan import Recipe


@pytest.fixture(params=["pipe", "folder", "device", "nothing", "NUL"])
def odd(request, tmp_path):
    """What is in the place of a file, and the reason."""
    path = tmp_path / "it.json"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "NUL":
        path = tmp_path / "a\0b"
    words = {"pipe": "a pipe, not a file", "folder": "a folder, not a file", "device": "a device, not a file"}
    return path, words.get(request.param, "No such file" if request.param == "nothing" else "null")


def test_what_is_no_plain_file_is_not_opened(odd):
    path, words = odd
    for door in (stranger.read, stranger.read_json, Recipe.load, Allocation.load):
        with pytest.raises(ValueError, match=words):
            door(path)


def test_a_bound_holds_for_files_that_have_no_size(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert stranger.read(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes, expected at most 4"):
        stranger.read(tmp_path / "a", 4)
    if os.path.exists("/proc/self/maps"):
        with pytest.raises(ValueError, match="more than 10 bytes"):
            stranger.read("/proc/self/maps", 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10**6, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("[" + "[]," * 2**20 + "1]", "more than 1048576 lists"),
        ("1" * 5000, "it is not JSON"),
        ("[1,", "it is not JSON: .* line 1 column 4"),
        ('{"a": NaN}', "the number NaN"),
        ("[-Infinity]", "the number -Infinity"),
        (r'["\ud800"]', "no Unicode"),
        ('"' + r"\"" * 10**5, "it is not JSON"),
    ],
)
def test_json_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        stranger.parse(text)


def test_brackets_inside_text_are_no_depth():
    data = {"a": ["[" * 500, '"]}\\' * 90], "b": "\U0001f600"}
    assert stranger.parse(json.dumps(data)) == data


LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_is_what_json_says(data):
    assert stranger.parse(json.dumps(data).encode()) == data


def test_an_archive_is_unpacked_to_a_bound():
    bomb = lzma.compress(bytes(10**8), preset=0)
    assert len(bomb) < 10**5
    with pytest.raises(ValueError, match="holds more than 1000000 bytes"):
        stranger.unpack(bomb, 10**6)
    for damaged in (bomb[:-30], b"no archive", bomb[:200]):
        with pytest.raises(ValueError, match=r"no xz file, or damaged"):
            stranger.unpack(damaged, 10**9)
    two = lzma.compress(b"one") + lzma.compress(b"two")
    assert stranger.unpack(two, 6) == b"onetwo"
    with pytest.raises(ValueError, match="64 xz files or more"):
        stranger.unpack(lzma.compress(b"") * 100, 10)


def test_words_are_safe_to_print():
    assert stranger.printable("a\n b\x1b[2J\ud800") == "a b\\x1b[2J\\ud800"
    assert len(stranger.printable("x" * 10**6)) == 1000
