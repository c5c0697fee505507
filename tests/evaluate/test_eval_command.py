"""`kvist eval` by hand, on the bundled model and a few words."""

import json

import pytest
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.demo.model import FOLDER
from kvist.evaluate.registry import kinds
from kvist.evaluate.suite import asked

WORDS = "The old house stood by the river, and nobody had lived in it since the winter of the flood. "


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    seasons = ["spring", "summer", "autumn", "winter", "year"]
    path.write_text("".join(WORDS.replace("winter", season) for season in seasons * 8))
    return str(path)


def call(*words: str, code: int = 0, model: str = str(FOLDER)):
    result = CliRunner().invoke(app, ["eval", model, "--device", "cpu", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def tasks(*words: str, **options) -> dict[str, dict]:
    """The results of each task, by its name."""
    found = json.loads(call(*words, "--json", **options).stdout)
    return {one["task"]: one for one in found["tasks"]}


def refused(*words: str) -> str:
    """The one sentence of a refusal."""
    result = call(*words, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("kvist: ")]
    assert result.stdout == "" and len(lines) == 1
    return lines[0]


def test_help_and_tasks():
    assert "Examples" in CliRunner().invoke(app, ["eval", "--help"]).stdout
    listed = CliRunner().invoke(app, ["eval", "--list-tasks"]).stdout
    assert all(kind.title in listed and kind.words in listed for kind in kinds().values())


def test_names_of_tasks():
    def named(words: str) -> list[tuple[str, str]]:
        return [(each.kind.name, each.of) for each in asked(words, {})]

    assert named("fidelity, needle,fidelity") == [("fidelity", ""), ("needle", "")]
    assert named("ppl,lm-eval:arc_easy,hellaswag,needle") == [
        ("ppl", ""),
        ("lm-eval", "arc_easy,hellaswag"),
        ("needle", ""),
    ]
    assert named("longbench:qasper,longbench-e") == [("longbench", "qasper"), ("longbench-e", "")]
    for wrong in ("riddles", "ppl,riddles", "lm-eval:NAME", "lm-eval", "ppl:x"):
        with pytest.raises(ValueError, match="no task is called"):
            named(wrong)
    with pytest.raises(ValueError, match="names of tasks"):
        named(" ,")


def test_options_of_tasks():
    """A task's own words win over what is said for all; a list goes on behind a comma."""
    given = {"samples": 2, "depths": 7, "lengths": (64,), "mode": None, "step": 3}
    needle, ppl, passkey = (each.options for each in asked("needle depths=3 lengths=1K,2K,ppl,passkey seed=5", given))
    assert (needle.depths, needle.samples, needle.lengths, needle.seed) == (3, 2, (1024, 2048), 0)
    assert (ppl.lengths, ppl.step, ppl.mode) == ((64,), 3, None) and (passkey.depths, passkey.seed) == (7, 5)
    for words, said in (
        ("needle shots=3", "needle has no option 'shots=3'; it has: .*depths"),
        ("needle depths", "no option 'depths'"),
        ("fidelity mode=streamed", "--mode is 'simulated' or 'stored', found 'streamed'"),
        ("needle depths=some", "--depths is .*integer.*, found 'some'"),
        ("needle lengths=some", "expected a number of tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            asked(words, {})


@pytest.mark.parametrize("mode", ["simulated", "stored"])
def test_perplexity_and_resuming(mode, book, tmp_path):
    out = tmp_path / "results"
    words = ["--data", book, "-n", "2", "-m", "int4", "-m", "hadamard:2", "--mode", mode, "--out", str(out)]
    words += ["--tasks", "ppl", "--seqlen", "128"]
    found = tasks(*words)["ppl"]
    exact, int4, hadamard = found["results"]
    assert (found["settings"]["mode"], found["settings"]["seqlen"]) == (mode, 128)
    assert [r["method"] for r in found["results"]] == ["exact", "int4", "hadamard:2"]
    assert exact["kl"]["value"] == 0 and 0 < int4["kl"]["value"] < hadamard["kl"]["value"]
    assert int4["log_perplexity_difference"] == {"value": 0, "low": 0, "high": 0}
    assert hadamard["kl_difference"]["value"] == pytest.approx(hadamard["kl"]["value"] - int4["kl"]["value"])
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line)["settings"]["mode"] == mode for line in lines)
    assert tasks(*words)["ppl"] == found and (out / "results.jsonl").read_text().splitlines() == lines


def test_another_name_of_what_is_known(book, tmp_path):
    words = ["--data", book, "-n", "2", "--tasks", "ppl", "--seqlen", "64", "--out", str(tmp_path / "out")]
    first, second = (tasks(*words, "-m", name)["ppl"]["results"] for name in ("int4", "int4 group=0"))
    assert second[1]["method"] == "int4 group=0" and second[1] | {"method": "int4"} == first[1]


def test_one_side_alone(book):
    words = ["--data", book, "-n", "2", "--tasks", "ppl", "--seqlen", "64", "-m", "int4", "-m", "int8"]
    found = tasks(*words, "--parts", "keys")["ppl"]["results"]
    assert [(row["method"], row["part"]) for row in found] == [("exact", "both"), ("int4", "keys"), ("int8", "keys")]
    assert found[1]["kl_difference"]["value"] == 0 > found[2]["kl_difference"]["value"]


def test_many_tasks_at_once(book, tmp_path):
    words = ["--tasks", "fidelity,horizon,nuisance,needle", "--data", book, "-n", "2", "--seqlen", "160", "-m", "int8"]
    words += ["--lengths", "200", "--depths", "2", "--samples", "1", "--parts", "both,keys", "--stress", "strong"]
    words += ["--plot", str(tmp_path / "maps.png"), "--out", str(tmp_path / "out")]
    found = tasks(*words, model="bundled")
    assert list(found) == ["fidelity", "horizon", "nuisance", "needle"]
    methods = [(row["method"], row["part"]) for row in found["fidelity"]["results"]]
    assert methods[:3] == [("exact", "both"), ("int8", "both"), ("int8", "keys")]
    assert [name for name, _ in methods[3:]] == ["floor: float16", "floor: batch 1"]
    assert found["needle"]["results"][0]["items"] == 2
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["stress"] for row in rows} == {"strong"}


def test_rescoring(book, tmp_path):
    out = tmp_path / "out"
    words = ["--tasks", "needle", "--data", book, "-m", "int8", "--lengths", "160", "--depths", "1", "--samples", "2"]
    tasks(*words, "--out", str(out))
    file = out / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = [row["values"]["score"] for row in rows]
    for row in rows:
        row["values"]["score"] = [0.25, 0.25]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = CliRunner().invoke(app, ["eval", "--rescore", str(out), "--json"])
    assert json.loads(again.stdout) == {"rows": 2, "items": 4, "changed": 4}
    assert [json.loads(line)["values"]["score"] for line in file.read_text().splitlines()] == right


def test_long_windows_and_limits(book):
    words = ["--tasks", "ppl", "--data", book, "-m", "int8", "-n", "2", "--limit", "1"]
    found = json.loads(call(*words, "--lengths", "96,128", "--json").stdout)["tasks"]
    assert [one["settings"]["seqlen"] for one in found] == [96, 128]
    assert [one["settings"]["prompt"] for one in found] == [48, 64]
    assert all(one["results"][0]["items"] == 1 for one in found)
    (shortest,) = json.loads(call(*words, "--lengths", "2", "--json").stdout)["tasks"]
    assert shortest["results"][0]["perplexity"]["value"] > 1


def test_the_table(book):
    printed = call("--data", book, "-n", "2", "--seqlen", "96", "-m", "int8").stdout
    assert "fidelity:" in printed and "2 items" in printed and "paired, to int8" in printed and "floor" in printed


def test_refusals(book, tmp_path):
    base = ["--data", book, "--seqlen", "96", "-n", "2"]
    assert "no task is called 'riddles'" in refused(*base, "-t", "riddles")
    assert "--mode is" in refused(*base, "--mode", "streamed")
    assert "--prefill is" in refused(*base, "--prefill", "streamed")
    assert "--stress is" in refused(*base, "--stress", "huge")
    assert "parts are" in refused(*base, "--parts", "queries")
    assert "did you mean 'kivi'" in refused(*base, "-m", "kvi")
    assert "cannot be read" in refused("--data", str(tmp_path / "no.txt"))
    assert "found none" in refused("--data", "wikitext2", "--data-dir", str(tmp_path))
    assert "knows 2048 positions" in refused("--data", book, "--seqlen", "4096")
    assert "contexts have at most" in refused(*base, "-t", "passkey", "--lengths", "2048")
    assert "0 for all" in refused(*base, "--windows", "500")
    assert "needs" in refused(*base, "-m", "kvquant")
    assert "to score" in refused(*base, "--prompt", "96")
    assert "ends in .png" in refused(*base, "--plot", "maps.jpg")
    assert "--plot draws answers" in refused(*base, "--plot", str(tmp_path / "maps.png"), "--out", str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()
    assert "at least 4 tokens" in refused("--data", book, "-t", "horizon", "--seqlen", "3")
    (tmp_path / "foreign").write_text("hello\n")
    assert "--out is a folder" in refused(*base, "--out", str(tmp_path / "foreign"))
    (tmp_path / "results.jsonl").write_text("hello\n")
    assert "another --out" in refused(*base, "--out", str(tmp_path))
    result = CliRunner().invoke(app, ["eval", "--rescore", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "found none" in result.stderr
    assert CliRunner().invoke(app, ["eval"]).exit_code == 2
