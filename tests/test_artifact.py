"""The artefact: a round trip to the bit, its size, and every reason to refuse a file."""

import json
import types

import numpy as np
import pytest
import torch
from artifacts import half, made
from safetensors.torch import load_file, save, save_file

from kvist.artifact import JSON, TENSORS, Artifact, Fit, _digest
from kvist.coding import Fixed, Table
from kvist.methods.kvquant import recipe
from kvist.types import ModelIdentity


def near(a: Artifact, b: Artifact) -> bool:
    """Equal in all; tables equal in the fp32 numbers that are ever used of them."""
    plain = all(getattr(a, name) == getattr(b, name) for name in ("model", "settings", "origin", "rotary"))
    for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
        pairs = zip(x.table.tables(torch.device("cpu")), y.table.tables(torch.device("cpu")), strict=True)
        plain &= x.range == y.range and (x.table.read is None) == (y.table.read is None)
        plain &= all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in pairs) and x.table.grid == y.table.grid
    return plain


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["grid", "grid read", "free", "free read"])
def test_round_trip(kind, bits, tmp_path):
    artifact = made(kind, bits=bits)
    artifact.save(tmp_path / "a")
    loaded = Artifact.load(tmp_path / "a")
    assert near(loaded, artifact) and loaded.on_grid == ("grid" in kind)
    if "grid" not in kind:  # fp32 numbers are kept exactly, at once
        assert loaded == artifact
    loaded.save(str(tmp_path / "b"))
    assert Artifact.load(str(tmp_path / "b")) == loaded  # and all, once they come from a file
    for name in (JSON, TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [{"keys": "post-rope"}, {"key_axis": "token"}, {"cap": "none", "slots": 6}, {"outliers": 0.0}, {"qnorm": True}],
)
def test_settings_come_back_and_make_the_same_recipe(settings, tmp_path):
    artifact = made("free", **settings)
    artifact.save(tmp_path)
    loaded = Artifact.find(tmp_path)
    assert loaded == artifact and recipe(loaded) == recipe(artifact)
    assert not recipe(loaded).needs
    head = json.loads((tmp_path / JSON).read_text())
    assert head["settings"] == artifact.settings.model_dump() and head["origin"]["source"] == "a book"


def test_the_file_holds_bytes_for_a_grid_and_fp32_for_the_rest(tmp_path):
    made("grid read").save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert {str(tensors[f"key.0.{name}"].dtype) for name in ("points", "read")} == {"torch.uint8"}
    assert {str(tensors[f"key.1.{name}"].dtype) for name in ("low", "high")} == {"torch.float16"}
    assert "value.0.low" not in tensors
    made("free").save(tmp_path)
    assert load_file(tmp_path / TENSORS)["value.1.points"].dtype == torch.float32


def test_points_of_earlier_files_are_read(tmp_path):
    """Tables off the grid were once kept in fp16."""
    artifact = made("free")
    artifact.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    data = save({k: x.half() if k.endswith("points") else x for k, x in tensors.items()})
    (tmp_path / TENSORS).write_bytes(data)
    head = json.loads((tmp_path / JSON).read_text()) | {"digest": _digest(data)}
    (tmp_path / JSON).write_text(json.dumps(head))
    loaded = Artifact.load(tmp_path)
    assert [fit.table.points for fit in loaded.keys] == [half(fit.table.points) for fit in artifact.keys]


def test_flat_tables_come_back(tmp_path):
    """A side of equal numbers has a table of one point."""
    artifact = made("free")
    still = Fit(table=Table(bits=3, points=(0.25,) * 8))
    artifact = artifact.model_copy(update={"values": (still,) * 2})
    artifact.save(tmp_path)
    assert Artifact.load(tmp_path) == artifact and not artifact.on_grid


def test_size_of_llama_7b(tmp_path):
    identity = ModelIdentity(name="x", kind="llama", config="c", layers=32, heads=32, key_dim=128, value_dim=128)
    small, random = made("grid read", bits=4), np.random.default_rng(0)
    keys = []
    for _ in range(32):
        ends = np.sort(random.normal(0, 3, (2, 4096)), 0)
        keys.append(Fit(table=small.keys[0].table, range=Fixed(low=half(ends[0]), high=half(ends[1]))))
    update = {"model": identity, "keys": tuple(keys), "values": small.values[:1] * 32}
    big = Artifact.model_validate(small.model_copy(update=update).model_dump())
    big.save(tmp_path)
    per_layer = sum(path.stat().st_size for path in tmp_path.iterdir()) / 32
    assert 4 * 4096 < per_layer < 25_000  # two fp16 numbers per channel, and little else
    assert Artifact.load(tmp_path).keys[31].range == big.keys[31].range


def refused(folder) -> str:
    with pytest.raises(ValueError) as caught:
        Artifact.load(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence and "\n" not in sentence and "Traceback" not in sentence
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return sentence


@pytest.fixture
def saved(tmp_path):
    made("grid").save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_missing_files(name, saved):
    (saved / name).unlink()
    assert "No such file" in refused(saved) and "kvist calibrate" in refused(saved)


def test_no_folder_and_a_file_in_its_place(tmp_path):
    assert "No such file" in refused(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in refused(tmp_path / "file")
    with pytest.raises(ValueError, match="found a file at"):
        made().save(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"format": 2}', '{"a": 1}', "\x00"])
def test_damaged_json(text, saved):
    (saved / JSON).write_text(text)
    assert "it is not JSON" in refused(saved) or "no artefact of format 1" in refused(saved)


def test_json_that_is_no_text(saved):
    (saved / JSON).write_bytes(b"\xff\xfe\x00")
    assert "artifact.json: it is not text in UTF-8" in refused(saved)


def test_every_byte_of_the_tensors_counts(saved):
    data = bytearray((saved / TENSORS).read_bytes())
    for at in (0, 9, len(data) // 2, len(data) - 1):
        torn = bytearray(data)
        torn[at] ^= 1
        (saved / TENSORS).write_bytes(torn)
        assert "damaged" in refused(saved)
    (saved / TENSORS).write_bytes(data[:-1])
    assert "damaged" in refused(saved)


def test_an_interrupted_save_leaves_the_older_artefact(saved, monkeypatch):
    from pathlib import Path

    def failing(self, *args):
        raise KeyboardInterrupt

    before = Artifact.load(saved)
    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(KeyboardInterrupt):
        made("free").save(saved)
    assert Artifact.load(saved) == before
    assert {path.name for path in saved.iterdir()} == {JSON, TENSORS}  # no scratch file stays


def test_stopped_between_its_two_files_is_refused(saved, monkeypatch):
    from pathlib import Path

    replace = Path.replace

    def once(self, target):
        monkeypatch.setattr(Path, "replace", failing)
        return replace(self, target)

    def failing(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        made("fp16").save(saved)
    assert "is not the file that artifact.json was written with" in refused(saved)
    assert {path.name for path in saved.iterdir()} == {JSON, TENSORS}


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_folder_in_place_of_either_file_writes_neither(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"expected a file to write at .*{name}, found a folder"):
        made().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert "No such file" in refused(tmp_path) or f"{name}: it is a folder" in refused(tmp_path)


def edit(folder, change=lambda head: None, tensors=None) -> None:
    """Files by somebody else's hand, with a checksum that fits."""
    head = json.loads((folder / JSON).read_text())
    if tensors is not None:
        (folder / TENSORS).write_bytes(save(tensors))
        head["digest"] = _digest((folder / TENSORS).read_bytes())
    change(head)
    (folder / JSON).write_text(json.dumps(head))


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("layers", lambda head: head["model"].update(layers=3)),
        ("layers: Input should be less", lambda head: head["model"].update(layers=10**12)),
        ("layers: Input should be a valid integer", lambda head: head["model"].update(layers="two")),
        ("expected named fields, found None", lambda head: head.pop("model")),
        ("expected named fields, found []", lambda head: head.update(model=[])),
        ("points", lambda head: head["settings"].update(bits=4)),
        ("no valid", lambda head: head["settings"].update(bits="many")),
        ("no valid", lambda head: head["settings"].update(slots=400, cap="none")),
        ("no valid", lambda head: head["settings"].update(slots=-2)),
        ("no valid", lambda head: head["settings"].update(outliers=0.5)),
        ("no valid", lambda head: head["settings"].update(surprise=1)),
        ("no valid", lambda head: head.update(method="another")),
        ("no valid", lambda head: head.update(origin="a book")),
        ("rotary", lambda head: head.update(rotary=None)),
        ("rotary", lambda head: head["settings"].update(keys="post-rope")),
        ("per token have none", lambda head: head["settings"].update(key_axis="token")),
        ("need as many ranges", lambda head: head["model"].update(heads=3)),
    ],
)
def test_json_that_does_not_fit_is_refused(words, change, saved):
    edit(saved, change)
    sentence = refused(saved)
    assert words in sentence or "damaged" in sentence, sentence


def _without(tensors, name):
    tensors.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: _without(t, "key.1.points"),
        lambda t: _without(t, "value.0.points_ends"),
        lambda t: _without(t, "key.0.high"),
        lambda t: t.update({"key.0.points_ends": torch.zeros(3)}),
        lambda t: t.update({"key.0.points_ends": torch.tensor(1.0)}),
        lambda t: t.update({"key.0.points_ends": torch.tensor([torch.nan, torch.nan])}),
        lambda t: t.update({"key.0.points_ends": torch.tensor([-torch.inf, torch.inf])}),
        lambda t: t.update({"key.0.points": torch.zeros(8, 1)}),
        lambda t: t.update({"key.0.points": torch.tensor(1.0)}),
        lambda t: t.update({"key.0.points": torch.arange(16, dtype=torch.uint8)}),
        lambda t: t.update({"key.0.points": torch.arange(8, dtype=torch.uint8).flip(0)}),
        lambda t: t.update({"key.0.points": torch.full((8,), torch.nan)}),
        lambda t: t.update({"key.0.low": torch.full((64,), torch.nan)}),
        lambda t: t.update({"key.0.low": torch.full((64,), torch.inf)}),
        lambda t: t.update({"key.0.low": torch.full((64,), 1e4), "key.0.high": torch.zeros(64)}),
        lambda t: t.update({"key.0.low": torch.zeros(63), "key.0.high": torch.zeros(63)}),
        lambda t: t.update({"key.0.low": torch.zeros(64, 1), "key.0.high": torch.zeros(64, 1)}),
        lambda t: t.update({"key.0.low": torch.tensor(1.0)}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, saved):
    tensors = load_file(saved / TENSORS)
    change(tensors)
    edit(saved, tensors=tensors)
    assert "damaged" in refused(saved) or "no valid artefact" in refused(saved)


def test_foreign_safetensors(saved):
    save_file({"weight": torch.zeros(3)}, saved / TENSORS)
    edit(saved, lambda head: head.update(digest=_digest((saved / TENSORS).read_bytes())))
    assert "damaged" in refused(saved)
    (saved / TENSORS).write_bytes(b"no safetensors")
    edit(saved, lambda head: head.update(digest=_digest(b"no safetensors")))
    assert "damaged" in refused(saved)


@pytest.mark.parametrize(
    ("words", "update"),
    [
        ("must fit each", {"keys": ()}),
        ("expected tables of 3 bits", {"values": (Fit(table=Table(bits=3)),) * 2}),
        ("found one of 2", {"values": (Fit(table=Table(bits=2, points=(0.0, 1.0, 2.0, 3.0))),) * 2}),
    ],
)
def test_parts_that_do_not_belong_together(words, update):
    parts = {name: getattr(made(), name) for name in Artifact.model_fields}
    with pytest.raises(ValueError, match=words):
        Artifact(**parts | update)


def test_words():
    assert "nuq3-5% for" in str(made()) and "nf4 for" in str(made(levels="nf", outliers=0, bits=4))
    assert isinstance(Artifact.push, types.FunctionType)
