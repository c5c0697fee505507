"""The benchmarks run end to end at toy sizes; their numbers are not tested."""

import json

import pytest
import torch

from kvist.bench import contenders, decode, encode


@pytest.fixture
def no_optional_backends(monkeypatch):
    """A machine without quanto and hqq: the rows must say so."""

    def missing(backend, bits):
        raise ImportError(f"{backend} is not installed")

    monkeypatch.setattr(contenders, "quantized", missing)


def test_decode_races_named_contenders_and_reports_the_missing(no_optional_backends, tmp_path, capsys):
    out = tmp_path / "runs" / "decode.json"
    report = decode.run(lengths=[200], methods=["kivi recent=32", "int4"], steps=3, out=out, as_json=True)
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out) == json.loads(json.dumps(report))
    rows = {row["contender"]: row for row in report["rows"]}
    assert rows["quanto:2"]["failed"] == "ImportError: quanto is not installed"
    assert min(rows[name]["x dynamic"] for name in ("dynamic", "dynamic, masked")) == 1.0
    tokens = 200 + 3 + 2  # the context, the measured steps, two steps of warming up
    assert rows["dynamic"]["cache MiB"] * 2**20 == contenders.LAYERS * tokens * contenders.KV_HEADS * contenders.DIM * 4
    assert rows["kvist int4"]["median ms"] > 0
    assert not list(out.parent.glob("*.part"))


def test_decode_refuses_an_unknown_method(tmp_path):
    with pytest.raises(ValueError, match="kivi"):
        decode.run(lengths=[10], methods=["kiwi"], steps=1, out=tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_contenders_attend_to_the_same_numbers():
    """Given the same keys and values, kvist's exact cache and DynamicCache give the same output."""
    outs = []
    for racer in (contenders.dynamic(), contenders.ours("exact")):
        torch.manual_seed(0)
        racer.fill(70)
        outs.append(racer.step())
    assert torch.equal(*outs)


def test_encode_measures_both_sides_and_leaves_the_threads(tmp_path):
    before = torch.get_num_threads()
    report = encode.run(methods=["kivi:2"], rounds=1, out=tmp_path / "encode.json", as_json=True)
    assert torch.get_num_threads() == before
    assert [row["side"] for row in report["rows"]] == ["keys", "values"]
    assert all(row["MB/s"] > 0 and row["page us"] > 0 for row in report["rows"])
