"""`kvist profile` and `kvist allocate` by hand, on the bundled model; and one sentence for each mistake."""

import json

import pytest
from typer.testing import CliRunner

from kvist import text
from kvist.allocation import Allocation
from kvist.calibrate.profile import Profile
from kvist.cli.app import app
from kvist.demo.model import FOLDER

WORDS = "The old house stood by the river, and nobody had lived in it since the winter of the flood. "
PNG = b"\x89PNG\r\n\x1a\n"


def invoke(*words, code: int = 0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*words) -> str:
    said = invoke(*words, code=2).stderr
    assert said.startswith("kvist: ") and said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile of prompts on lines, and its picture."""
    folder = tmp_path_factory.mktemp("profile")
    prompts = [{"prompt": WORDS * 3}, {"text": WORDS * 4}, {"context": WORDS * 3, "input": "Who lived there?"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    words = ["--samples", 3, "--seqlen", 64, "--device", "cpu", "-m", "kivi recent=32", "-m", "hadamard"]
    words += ["--out", folder / "p.json", "--plot", folder / "p.png"]
    result = invoke("profile", FOLDER, "--prompts", folder / "prompts.jsonl", *words)
    return folder, result


def test_a_profile(folder):
    folder, result = folder
    found = Profile.load(folder / "p.json")
    assert {c.method: c.choices for c in found.loss_change} == {
        "kivi recent=32": (1, 2, 3, 4, 8),
        "hadamard": (1, 2, 3, 4, 8),
    }
    assert found.model.name == "kvist-6m" and found.origin.samples == 3 and found.origin.seqlen <= 64
    assert "values 4 bit" in " ".join(result.stdout.split()) or "keys 2 bit" in result.stdout
    assert (folder / "p.png").read_bytes().startswith(PNG)
    for sentence in found.unstable:
        assert sentence in " ".join(result.stderr.split())
    assert sorted(path.name for path in folder.iterdir() if "progress" in path.name) == []


def test_json_alone_on_stdout(folder, tmp_path):
    folder, _ = folder
    words = [
        "--samples",
        2,
        "--seqlen",
        48,
        "--device",
        "cpu",
        "--choices",
        "2,3",
        "--json",
        "--out",
        tmp_path / "p.json",
    ]
    found = json.loads(invoke("profile", FOLDER, "--prompts", folder / "prompts.jsonl", *words).stdout)
    assert found["loss_change"][0]["choices"] == [2, 3] and found["loss_change"][0]["method"] == "kvmix"
    assert found["summary"]["stability"].keys() == {"gradient-norm", "loss-change of kvmix"}


def test_allocations(folder, tmp_path):
    folder, _ = folder
    profile, out, picture = folder / "p.json", tmp_path / "a.json", tmp_path / "a.png"
    said = invoke("allocate", profile, "--out", out, "--plot", picture).stdout
    made = Allocation.load(out)
    assert sorted(made.k) == [2] * 5 + [3] and sorted(made.v) == [2] * 5 + [4] and made.model.name == "kvist-6m"
    assert "2.17" in said and "2.33" in said and f"--allocation {out}" in said
    assert picture.read_bytes().startswith(PNG)

    norms = [words for words in Profile.load(profile).unstable if "by gradient-norm" in words]
    assert json.loads(invoke("allocate", profile, "--out", out, "--json").stdout)["unstable"] == norms

    words = ["--budget", 3.8, "--method", "kivi recent=32", "--context", "4K", "--json"]
    for solver in ("exact", "greedy"):
        found = json.loads(invoke("allocate", profile, "--out", out, *words, "--solver", solver).stdout)
        assert found["bits_per_element"] <= 3.8 and found["k"] == list(Allocation.load(out).k)
    assert found["bits_per_element"] > 3.5

    words = ["--cache-memory", "40MiB", "--method", "hadamard", "--context", "32K", "--batch", 2, "--json"]
    found = json.loads(invoke("allocate", profile, "--out", out, *words).stdout)
    assert 0.8 * 40 * 2**20 < found["nbytes"] <= 40 * 2**20


def test_one_bit_is_proposed_only_where_it_was_tried(folder, tmp_path):
    words = ["--samples", 2, "--seqlen", 64, "--device", "cpu", "--choices", "2,4", "-m", "kivi recent=32"]
    invoke("profile", FOLDER, "--prompts", folder[0] / "prompts.jsonl", *words, "--out", tmp_path / "p.json")
    words = ["--budget", 1, "--method", "kivi recent=32", "--out", tmp_path / "a.json"]
    assert refused("allocate", tmp_path / "p.json", *words).endswith("stored bits; give that or more\n")
    assert refused("allocate", folder[0] / "p.json", *words).endswith("1 bit by --choices 1,2,3,4,8\n")


def test_prompts_with_blank_lines_and_separators_of_unicode(tmp_path):
    rows = [{"prompt": f"One\u2028two \u0085 {i}"} for i in range(3)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert text.prompts(str(path)) == [row["prompt"] for row in rows]
    path.write_text('{"prompt": "a"}\n\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"line 3 of .*prompts\.jsonl is no prompt"):
        text.prompts(str(path))


def test_an_allocation_runs(folder, tmp_path):
    folder, _ = folder
    invoke(
        "allocate", folder / "p.json", "--top", "50%", "--high", "k4v4", "--low", "k1v3", "--out", tmp_path / "a.json"
    )
    words = ["run", FOLDER, "--greedy", "--max-new-tokens", 4, "--device", "cpu", "--json", "-p", WORDS * 4]
    made = Allocation.load(tmp_path / "a.json")
    for method in ("kvmix", "hadamard"):
        found = json.loads(invoke(*words, "-m", method, "--allocation", tmp_path / "a.json").stdout)
        layers = found["recipe"]["layers"]
        assert [layer["key"]["codec"]["levels"]["bits"] for layer in layers] == list(made.k)
        assert [layer["value"]["codec"]["levels"]["bits"] for layer in layers] == list(made.v)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--budget", "1"],
            "--budget 1.0 is impossible: at 1 × 32768 tokens the least is 3.05 stored bits; give that or more, or",
        ),
        (["--cache-memory", "1MiB"], "holds no cache of 1 × 32768 tokens: the least is"),
        (["--budget", "3", "--top", "20%"], "give one of --top"),
        (["--budget", "3", "--score", "gradient-norm"], "do not say what a bit buys"),
        (["--budget", "-1"], "--budget is in stored bits per element"),
        (["--budget", "3", "--method", "int4"], "int4 has no option 'k'"),
        (["--budget", "3", "--method", "kivi group=64"], "not of 'kivi group=64'"),
        (["--high", "4bits"], "such as k3v4"),
        (["--top", "many"], "such as 20%"),
        (["--score", "magic"], "found 'magic'"),
        (["--solver", "best", "--budget", "5"], "found 'best'"),
        (["--cache-memory", "plenty"], "such as '10GiB'"),
        (["--plot", "a.pdf"], "ends in .png"),
        (["--top", "30%", "--reference"], "give one of --top, --reference"),
        (["--top", ""], "such as 20%"),
        (["--budget", "5", "--score", "magic"], "found 'magic'"),
        (["--budget", "5", "--high", "k4v4"], "--high would say nothing with --budget"),
        (["--choices", "2,3"], "--choices would say nothing with --top"),
        (["--solver", "greedy", "--choices", "2,3"], "--choices and --solver would say nothing with --top"),
        (["--budget", "5", "--choices", ""], "--choices is a list of widths"),
        (["--method", "logquant"], "bits must be 2 or 4"),
        (["--method", "int4"], "int4 takes no allocation"),
        (["--method", "kivi:2"], "give either an allocation or bits=, not both"),
    ],
)
def test_refused_allocations(folder, tmp_path, words, sentence):
    assert sentence in refused(
        "allocate", folder[0] / "p.json", "--method", "kivi recent=32", *words, "--out", tmp_path / "a"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompts", "absent.jsonl"], "the prompts absent.jsonl cannot be read"),
        (["--prompts", "{folder}/prompts.jsonl", "--samples", "9"], "has 3 prompts of at least 2 tokens"),
        (["--prompts", "{folder}/p.png"], "it is not text in UTF-8"),
        (["--prompts", "{folder}/prompts.jsonl", "-m", "int8"], "int8 has no option 'k'"),
        (["--prompts", "{folder}/prompts.jsonl", "--choices", "two"], "--choices is a list of widths"),
        (["--prompts", "{folder}/prompts.jsonl", "--choices", "5"], "bits must be one of"),
        (["--prompts", "{folder}/prompts.jsonl", "--dtype", "float16"], "gradients underflow in float16"),
        (["--prompts", "{folder}/prompts.jsonl", "-m", "logquant", "--choices", "3"], "bits must be 2 or 4"),
    ],
)
def test_refused_profiles(folder, tmp_path, words, sentence):
    words = [word.format(folder=folder[0]) for word in words]
    assert sentence in refused("profile", FOLDER, *words, "--out", tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def test_a_profile_of_another_model(folder, tmp_path):
    """An allocation carries the model that it was made for."""
    invoke("allocate", folder[0] / "p.json", "--out", tmp_path / "a.json")
    made = Allocation.load(tmp_path / "a.json")
    made.model_copy(update={"model": made.model.model_copy(update={"key_dim": 128})}).save(tmp_path / "b.json")
    run = ["run", FOLDER, "-p", "Hello", "--device", "cpu", "--allocation"]
    assert "heads of 128, this model has heads of 64" in refused(*run, tmp_path / "b.json")
    made.model_copy(update={"k": made.k[:5], "v": made.v[:5]}).save(tmp_path / "c.json")
    assert "has 6 layers to serve, found 5 widths" in refused(*run, tmp_path / "c.json")
