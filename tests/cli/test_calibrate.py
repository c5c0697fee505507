"""`kvist calibrate` by hand, on the bundled model and a few words; and one sentence for each mistake."""

import json

import pytest
from typer.testing import CliRunner

from kvist.artifact import JSON, TENSORS, Artifact
from kvist.calibrate import passes, state
from kvist.cli.app import app
from kvist.demo.model import FOLDER

WORDS = "The old house stood by the river, and nobody had lived in it since the winter of the flood. "


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    seasons = ["spring", "summer", "autumn", "winter", "year"]
    path.write_text("".join(WORDS.replace("winter", season) for season in seasons * 3))
    return str(path)


def invoke(*words: str, code: int = 0):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def words_of(book: str, out, *more: str) -> list[str]:
    size = ["--samples", "2", "--seqlen", "64", "--device", "cpu"]
    return ["calibrate", str(FOLDER), "--data", book, "--out", str(out), *size, *more]


@pytest.fixture(scope="module")
def fitted(book, tmp_path_factory):
    """What one run with defaults says and leaves."""
    out = tmp_path_factory.mktemp("fitted") / "new" / "nuq3"
    return out, json.loads(invoke(*words_of(book, out, "--json")).stdout)


def test_json_and_files(fitted, book):
    out, found = fitted
    assert {path.name for path in out.iterdir()} == {JSON, TENSORS}
    artifact = Artifact.load(out)
    assert found["artifact"] == str(out) and found["on_grid"] is True
    assert found["nbytes"] == sum((out / name).stat().st_size for name in (JSON, TENSORS)) < 100_000
    wanted = {"bits": 3, "levels": "nuq", "outliers": 0.01, "cap": "token", "slots": 0, "sinks": 1, "qnorm": False}
    wanted |= {"keys": "pre-rope", "key_axis": "channel", "sensitivity": "fisher-scaled"}
    assert found["settings"] == wanted == artifact.settings.model_dump()
    origin = found["origin"]
    assert (origin["source"], origin["samples"], origin["seqlen"], origin["seed"]) == (book, 2, 64, 0)
    assert origin["digest"] and origin["versions"].keys() == {"kvist", "torch", "transformers", "python"}
    assert found["model"]["name"] == "kvist-6m"


def test_the_artefact_runs(fitted):
    out, _ = fitted
    words = ["run", str(FOLDER), "--greedy", "--max-new-tokens", "5", "--device", "cpu", "--json", "-p", WORDS * 4]
    found = json.loads(invoke(*words, "-m", f"kvquant artifact={out}").stdout)
    wider = json.loads(invoke(*words, "-m", f"kvquant artifact={out} recent=32").stdout)
    assert found["recipe"] == "kvquant" or found["recipe"]["name"] == "kvquant"
    assert found["text"] and 3 < found["bits_per_element"] < wider["bits_per_element"]


def test_the_same_words_make_the_same_files(fitted, book, tmp_path):
    out, _ = fitted
    invoke(*words_of(book, tmp_path))
    assert all((tmp_path / name).read_bytes() == (out / name).read_bytes() for name in (JSON, TENSORS))


def test_options_reach_the_artefact_and_what_is_printed(book, tmp_path):
    (tmp_path / "notes.txt").write_text("somebody's own" * 1000)
    (tmp_path / "deep").mkdir()
    options = ["--sensitivity", "none", "--sinks", "3", "--cap", "none", "--levels", "nf", "--keys", "post-rope"]
    said = invoke(*words_of(book, tmp_path, "-m", "kvquant bits=2 outliers=4%", *options, "--seed", "5"))
    settings = Artifact.load(tmp_path).settings
    assert (settings.bits, settings.outliers, settings.sinks, settings.levels) == (2, 0.04, 3, "nf")
    assert (settings.cap, settings.keys, settings.qnorm, settings.sensitivity) == ("none", "post-rope", True, "none")
    assert settings.slots >= 2 and f"{settings.slots} outlier slots" in said.stdout
    nbytes = sum((tmp_path / name).stat().st_size for name in (JSON, TENSORS))
    assert f": {nbytes} bytes in {tmp_path}" in said.stdout  # of the artefact, not of what else is there
    assert f"--method 'kvquant artifact={tmp_path}'" in said.stdout and "tables" in said.stderr
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("bits", [4, 5])
def test_keys_per_token_and_q_norm(bits, book, tmp_path):
    invoke(*words_of(book, tmp_path, "-m", f"kvquant:{bits} outliers=0", "--key-axis", "token", "--qnorm", "on"))
    found = Artifact.load(tmp_path)
    assert found.settings.key_axis == "token" and found.settings.qnorm and found.settings.outliers == 0
    assert all(fit.range is None and fit.table.read for fit in (*found.keys, *found.values))


def test_resuming(fitted, book, tmp_path, monkeypatch):
    out, _ = fitted
    monkeypatch.setattr(state, "EVERY", -1.0)
    real, calls = passes.listen, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the machine is going down")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "listen", failing)
        assert "kvist: the machine is going down" in invoke(*words_of(book, tmp_path), code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == [state.NAME]
    monkeypatch.setattr(passes, "listen", lambda *args: (calls.append(1), real(*args))[1])
    invoke(*words_of(book, tmp_path))
    assert len(calls) == 2 + 3  # 2 samples of 2 stages, one of them twice
    assert all((tmp_path / name).read_bytes() == (out / name).read_bytes() for name in (JSON, TENSORS))


def test_push(book, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Artifact, "push", lambda self, to: pushed.append((self.settings.bits, to)))
    words = words_of(book, tmp_path, "-m", "kvquant:4", "--sensitivity", "none", "--push", "me/mine")
    invoke(*words)
    assert pushed == [(4, "me/mine")]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["-m", "kivi:2"], "a method that can be fitted"),
        (["-m", "kvquant bits=7"], "bits"),
        (["-m", "kvquant outliers=60%"], "below half"),
        (["-m", "kvquant recent=8"], "recent window is chosen when"),
        (["-m", "kvquant artifact=/none"], "No such file"),
        (["-m", "kvquant bit=3"], "did you mean 'bits'"),
        (["--sensitivity", "hessian"], "--sensitivity is one of fisher-scaled, fisher, none"),
        (["--cap", "half"], "--cap is one of token, none"),
        (["--cap", "none", "-m", "kvquant outliers=0"], "--cap none is about outliers"),
        (["--cap", "none", "--key-axis", "token"], "--cap none needs thresholds of channels"),
        (["--levels", "nuqq"], "--levels is one of nuq, nf, int"),
        (["--keys", "rope"], "--keys is one of pre-rope, post-rope"),
        (["--key-axis", "head"], "--key-axis is one of channel, token"),
        (["--qnorm", "maybe"], "--qnorm is one of auto, on, off"),
        (["--sinks", "-1"], "--sinks"),
        (["--sinks", "63"], "leave nothing behind 63 sinks"),
        (["--samples", "0"], "--samples"),
        (["--seqlen", "4"], "--seqlen"),
        (["--seqlen", "20000"], "smaller --seqlen"),
        (["--data", "/none.txt"], "/none.txt cannot be read"),
        (["--data", "a-name"], "expected a text file"),
        (["--data-dir", "/none"], "/none"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_mistakes(more, sentence, book, tmp_path):
    out = tmp_path / "out"
    result = invoke(*words_of(book, out, *more), code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.stdout == "" and lines[-1].startswith("kvist: ") and sentence in lines[-1]
    assert len(lines) == 1 and not out.exists()


def test_what_is_missing_or_in_the_way(book, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for words, sentence in (
        (words_of(book, file), f"--out is a folder, found a file at {file}"),
        (words_of(book, tmp_path / "out")[:2], "--data"),
        (["calibrate", str(tmp_path / "none"), *words_of(book, tmp_path / "out")[2:]], "none"),
    ):
        result = invoke(*words, code=2)
        assert result.stdout == "" and sentence in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert file.read_text() == "x" and not (tmp_path / "out").exists()


def test_an_artefact_that_does_not_fit_is_one_sentence(fitted, tmp_path):
    import shutil

    out, _ = fitted
    shutil.copytree(out, tmp_path / "torn")
    (tmp_path / "torn" / TENSORS).write_bytes(b"")
    words = ["run", str(FOLDER), "-p", "a", "--max-new-tokens", "1", "--device", "cpu", "-m"]
    for method, sentence in (
        (f"kvquant artifact={tmp_path / 'torn'}", "damaged"),
        (f"kvquant artifact={tmp_path}", "No such file"),
        (f"kvquant artifact={out} bits=2", "fitted for 3 bits"),
        ("kvquant", "kvist calibrate MODEL"),
    ):
        result = invoke(*words, method, code=2)
        assert sentence in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_help():
    said = invoke("calibrate", "--help").stdout
    assert "Example" in said and "--sensitivity" in said and "fisher-scaled" in said
