"""Hostile and damaged quantizer files: a ValueError each, nothing run, no memory taken on their word."""

import pickle
import tracemalloc

import pytest
import torch
from hostile import HOSTILE, REASON
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import tiny_llama
from quantizers import Reduced, dump, entries, file, legacy

from kvist.calibrate import published
from kvist.calibrate.pickled import read
from kvist.calibrate.published import load, to_artifact

SMALL = dump(entries(items=5, bits=2, layers=1, channels=4))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path, case):
    sentinel = tmp_path / "sentinel"
    found = HOSTILE[case](sentinel)
    path = file(tmp_path, found)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * path.stat().st_size + 2**20
    assert not sentinel.exists()
    assert str(error.value).startswith("quantizer.pickle is no quantizer file of KVQuant: ")
    assert REASON.get(case, "which no file of tensors needs; none of it ran") in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize("change", ["more declared", "huge declared", "truncated", "tail", "zip", "os.system"])
def test_torch_sees_only_bytes_that_were_checked(tmp_path, change, monkeypatch):
    """What a storage declares is compared with what is there before torch sets memory aside for it."""

    def never(*args, **kwargs):
        raise AssertionError("torch.load was called")

    path = file(tmp_path, HOSTILE[f"nested {change}"](tmp_path / "sentinel"))
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(ValueError, match="is no quantizer file"):
        load(path)


def test_torch_is_asked_for_weights_only(tmp_path, monkeypatch):
    asked, original, path = [], torch.load, file(tmp_path, entries())

    def note(*args, **kwargs):
        asked.append(kwargs["weights_only"])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", note)
    monkeypatch.setattr(torch.storage, "_load_from_bytes", None)
    load(path)
    assert asked == [True] * 8


def test_bytes_are_decoded_once(tmp_path):
    """The same bytes, referred to again and again, would take their size each time."""
    shared = legacy()
    storages = [Reduced(torch.storage._load_from_bytes, bytes(bytearray(shared))) for _ in range(3)]
    assert len(read(pickle.dumps(storages, protocol=5))) == 3
    storages = [Reduced(torch.storage._load_from_bytes, shared) for _ in range(300)]
    with pytest.raises(ValueError, match="same bytes several times"):
        read(pickle.dumps(storages, protocol=5))


def test_files(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "absent.pickle"):
        with pytest.raises(ValueError, match="found no file at"):
            load(path)
    path = file(tmp_path, entries())
    monkeypatch.setattr(published, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100"):
        load(path)


@st.composite
def damaged(draw) -> bytes:
    """A small file with bytes changed, cut out, repeated or put in."""
    data = bytearray(SMALL)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        how = draw(st.sampled_from(["flip", "set", "cut", "end", "insert", "copy"]))
        if how == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            data[at] = draw(st.sampled_from(b"\x00\xff.()}]RbtaeusQPc\x93\x94\x85\x86\x87hjqr\x95\x8e\x96\x8aJMK"))
        elif how == "cut":
            del data[max(at, 1) : at + draw(st.integers(1, 40))]
        elif how == "end":
            del data[max(at, 1) :]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=12))
        else:
            data[at:at] = data[: draw(st.integers(1, 60))]
    return bytes(data)


@settings(max_examples=300)
@given(data=damaged() | st.binary(max_size=200).map(lambda tail: b"\x80\x05" + tail) | st.binary(max_size=60))
def test_fuzzed(tmp_path_factory, data):
    """A ValueError, or an artefact that is valid; nothing else."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pickle"
    path.write_bytes(data)
    try:
        artifact = to_artifact(load(path), tiny_llama(layers=1, dim=2))
    except ValueError:
        return
    assert artifact.settings.bits == 2 and len(artifact.keys) == 1


@given(at=st.integers(0, len(SMALL) - 1))
def test_cut_off(tmp_path_factory, at):
    path = tmp_path_factory.getbasetemp() / "cut.pickle"
    path.write_bytes(SMALL[:at])
    with pytest.raises(ValueError, match="is no quantizer file"):
        load(path)
