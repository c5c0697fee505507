"""`kvist eval ppl` by hand, on the bundled model and a few words."""

import json

import pytest
import typer
from typer.testing import CliRunner

from kvist.cli import evaluate
from kvist.cli.errors import Verbs
from kvist.demo.model import FOLDER

app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False)
app.add_typer(evaluate.app, name="eval")

WORDS = "The old house stood by the river, and nobody had lived in it since the winter of the flood. "


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    seasons = ["spring", "summer", "autumn", "winter", "year"]
    path.write_text("".join(WORDS.replace("winter", season) for season in seasons * 4))
    return str(path)


def call(*words: str, code: int = 0):
    result = CliRunner().invoke(app, ["eval", "ppl", str(FOLDER), "--seqlen", "128", "--device", "cpu", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def data(*words: str) -> dict:
    return json.loads(call(*words, "--json").stdout)


def refused(*words: str) -> str:
    """The one sentence of a refusal."""
    result = call(*words, code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.stdout == "" and len(lines) == 1 and lines[0].startswith("kvist: ")
    return lines[0]


def test_help():
    result = CliRunner().invoke(app, ["eval", "ppl", "--help"])
    assert result.exit_code == 0 and "simulated" in result.stdout and "Examples" in result.stdout


@pytest.mark.parametrize("mode", ["simulated", "stored"])
def test_json_and_resuming(mode, book, tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["--data", book, "-n", "2", "-m", "int4", "-m", "hadamard:2", "--mode", mode, "--out", str(out)]
    found = data(*words)
    exact, int4, hadamard = found["results"]
    assert (found["mode"], found["seqlen"], found["dtype"]) == (mode, 128, "bfloat16")
    assert [r["method"] for r in found["results"]] == ["exact", "int4", "hadamard:2"]
    assert all(r["windows"] == 2 and r["mode"] == mode for r in found["results"])
    assert exact["kl"]["value"] == 0 and 0 < int4["kl"]["value"] < hadamard["kl"]["value"]
    assert int4["log_perplexity_difference"] == {"value": 0, "low": 0, "high": 0}
    assert hadamard["kl_difference"]["value"] == pytest.approx(hadamard["kl"]["value"] - int4["kl"]["value"])
    lines = out.read_text().splitlines()
    assert len(lines) == 6 and all(json.loads(line)["mode"] == mode for line in lines)
    assert data(*words) == found and out.read_text().splitlines() == lines
    assert data(*words[:-2]) == found  # without a file, all is measured anew, and the same


def test_the_table(book):
    printed = call("--data", book, "-n", "2", "-m", "int8").stdout
    assert "2 × 128 tokens, stored" in printed and "log-ppl − first's" in printed and "paired, to int8" in printed
    assert "16.00" in printed and "100.0%" in printed


def test_float32_is_another_measurement(book, tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["--data", book, "-n", "1", "-m", "int8", "--out", str(out)]
    half, single = data(*words), data(*words, "--dtype", "float32")
    assert len(out.read_text().splitlines()) == 4
    assert half["results"][0]["bits"] == 16 and single["results"][0]["bits"] == 32
    assert single["results"][0]["perplexity"]["low"] is None  # one window


def test_refusals(book, tmp_path):
    assert "--mode is" in refused("--data", book, "--mode", "streamed")
    assert "did you mean 'kivi'" in refused("--data", book, "-m", "kvi")
    assert "cannot be read" in refused("--data", str(tmp_path / "no.txt"))
    assert "found none" in refused("--data", "wikitext2", "--data-dir", str(tmp_path))
    assert "positions" in refused("--data", book, "--seqlen", "4096")
    assert "0 for all" in refused("--data", book, "--windows", "500")
    assert "needs" in refused("--data", book, "-m", "kvquant", "--mode", "simulated")
    (tmp_path / "foreign").write_text("hello\n")
    assert "another --out" in refused("--data", book, "--out", str(tmp_path / "foreign"))
