"""Throughput: what is never run, arithmetic of a row, fixed lengths, the same tokens, and the command by hand."""

import json
import sys

import pytest
import torch
from models_tiny import tiny_llama
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kvist.bench import generation, memory, throughput
from kvist.bench.generation import Lengths, Racer, contenders, measure, prompts, speeds
from kvist.bench.throughput import Race
from kvist.cli.app import app
from kvist.demo.model import FOLDER
from kvist.methods import parse

MIB = 1 << 20
LENGTHS = Lengths(40, 9)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _unsettled(monkeypatch):
    """Collecting garbage before each run takes half a second of a process that has loaded everything."""
    monkeypatch.setattr(memory, "settle", lambda: None)


def racer(name: str, method: str = "exact") -> Racer:
    """One of the contenders over the tiny model."""
    found = contenders(tiny_llama(), {method: parse(method)}, LENGTHS)
    return next(each for each in found if each.name == name)


def faked(peak):
    """A measurement that holds `peak(batch)` bytes and takes no time."""

    def fake(model, racer, batch, lengths, rounds, seed):
        rate = {"tokens/s": 10.0 * batch, "decode tokens/s": 1.0, "prefill tokens/s": 1.0, "first token s": 1.0}
        return rate | {"cache bytes": batch, "peak bytes": peak(racer, batch)}

    return fake


@pytest.mark.parametrize(
    "peak",
    [
        lambda batch: 3 * MIB * batch,
        lambda batch: 20 * MIB + MIB * batch,
        lambda batch: 5 * MIB + MIB * batch**1.3,  # bends upwards
        lambda batch: max(4, batch) * 2 * MIB,  # flat at first
        lambda batch: None,  # the system does not tell
    ],
)
@pytest.mark.parametrize("limit", [100 * MIB, 200 * MIB, 600 * MIB])
def test_nothing_is_run_that_is_predicted_not_to_fit(peak, limit, monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "measure", faked(lambda racer, batch: peak(batch) and int(peak(batch))))
    monkeypatch.setattr(memory, "free", lambda device: 1 << 40)
    methods = {"exact": parse("exact")}
    race = Race(Lengths(40, 9), limit, most=4096)
    report = throughput.run(tiny_llama(), methods, "tiny", race, out=tmp_path / "t.json")
    for entry in report["largest"]:
        rows = [row for row in report["rows"] if row["contender"] == entry["contender"]]
        *ran, last = rows
        assert [row["batch"] for row in rows] == [2**i for i in range(len(rows))]
        assert all(row["predicted bytes"] <= limit and "tokens/s" in row for row in ran)
        assert all((row["peak bytes"] or 0) <= limit for row in ran)
        assert entry["measured"] == ran[-1]["batch"]
        if last["batch"] == 4096 and "tokens/s" in last:
            continue
        assert last["predicted bytes"] > limit and "tokens/s" not in last and "GiB" in last["not run"]
        assert entry["ended by memory"]
        told = [None, *(row["peak bytes"] for row in ran)]
        words = ["arithmetic alone" if high is None else "arithmetic and peaks" for high in told]
        assert [row["predicted by"] for row in rows] == words
        line = entry["by the line through the peaks"]
        if line is not None:
            assert entry["measured"] <= line
    assert json.loads((tmp_path / "t.json").read_text()) == json.loads(json.dumps(report))


def test_a_straight_line_is_followed_to_the_end(monkeypatch):
    monkeypatch.setattr(throughput, "measure", faked(lambda racer, batch: 20 * MIB + MIB * batch))
    monkeypatch.setattr(memory, "free", lambda device: 1 << 40)
    report = throughput.run(tiny_llama(), {}, "tiny", Race(Lengths(40, 9), 200 * MIB))
    assert {entry["measured"] for entry in report["largest"]} == {64}  # 128: 148 MiB, a tenth and 64 MiB more
    assert {entry["by the line through the peaks"] for entry in report["largest"]} == {180}


def test_memory_that_others_took_meanwhile_counts(monkeypatch):
    left = iter([200 * MIB, 200 * MIB])
    monkeypatch.setattr(throughput, "measure", faked(lambda racer, batch: 10 * MIB * batch))
    monkeypatch.setattr(memory, "free", lambda device: next(left, 15 * MIB))
    monkeypatch.setattr(throughput, "contenders", lambda *_: contenders(tiny_llama(), {}, LENGTHS)[:1])
    report = throughput.run(tiny_llama(), {}, "tiny", Race(Lengths(40, 9), 100 * MIB))
    assert [row["batch"] for row in report["rows"] if "tokens/s" in row] == [1]


def test_speeds_by_hand():
    """3 rows, 4 tokens each, the first after 2 s and one each half second: 12 tokens in 3.5 s."""
    row = speeds(3, Lengths(10, 4), 100.0, [102.0, 102.5, 103.0, 103.5])
    assert row == {
        "tokens/s": pytest.approx(12 / 3.5),
        "decode tokens/s": pytest.approx(9 / 1.5),
        "prefill tokens/s": pytest.approx(15.0),
        "first token s": 2.0,
    }


@pytest.mark.parametrize("name", ["dynamic, SDPA", "dynamic, SDPA, one padding slot", "static, SDPA", "kvist exact"])
def test_lengths_are_fixed_whatever_the_model_would_stop_at(name):
    model, each = tiny_llama(), racer(name)
    ids = prompts(model, 3, LENGTHS.prompt, seed=0)
    first, start, times = generation.generate(model, each, each.make(), ids, LENGTHS.new)
    own = model.generation_config
    own.eos_token_id = int(first[0, LENGTHS.prompt])
    try:
        again, *_ = generation.generate(model, each, each.make(), ids, LENGTHS.new)
        assert model.generation_config is own
    finally:
        own.eos_token_id = None
    assert torch.equal(first, again) and torch.equal(first[:, : LENGTHS.prompt], ids)
    assert first.shape == (3, LENGTHS.total)
    assert len(times) == LENGTHS.new and start < times[0] and times == sorted(times)


def test_exact_generates_what_the_dynamic_cache_generates():
    model = tiny_llama()
    ids = prompts(model, 2, LENGTHS.prompt, seed=3)
    outs = [
        generation.generate(model, each, each.make(), ids, LENGTHS.new)[0]
        for each in (racer("dynamic, SDPA"), racer("kvist exact"))
    ]
    assert torch.equal(*outs) and outs[0][:, LENGTHS.prompt :].unique().numel() > 2


@pytest.mark.parametrize("name", ["dynamic, SDPA", "dynamic, SDPA, one padding slot", "static, SDPA", "kvist exact"])
def test_chunks_change_nothing_but_the_peak(name):
    model, each, seen = tiny_llama(), racer(name), []
    ids = prompts(model, 2, LENGTHS.prompt, seed=3)
    whole = generation.generate(model, each, each.make(), ids, LENGTHS.new)[0]
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        chunked = generation.generate(model, each, each.make(), ids, LENGTHS.new, chunk=16)[0]
    finally:
        hook.remove()
    assert (
        torch.equal(whole, chunked) and max(seen) == 16 and sum(seen[: -LENGTHS.new]) <= LENGTHS.prompt + each.padding
    )
    short = Lengths(LENGTHS.prompt, LENGTHS.new, chunk=16)
    assert each.predict(model, 2, short) < each.predict(model, 2, LENGTHS)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("dynamic, SDPA", LENGTHS.total - 1), ("static, SDPA", LENGTHS.total), ("kvist exact", LENGTHS.total)],
)
def test_bytes_of_the_cache_are_measured(name, tokens):
    """The last token is never fed to the model; storage that is reserved has room for it."""
    each = racer(name)
    row = measure(tiny_llama(), each, 3, LENGTHS, rounds=2)
    counters = 2 * 8 if name.startswith("static") else 0  # an integer per layer
    assert row["cache bytes"] == 2 * 2 * 3 * 2 * 32 * 4 * tokens + counters  # sides, layers, rows, heads, dim, fp32
    assert row["cache bytes"] - counters <= each.cache_bytes(3) <= 1.3 * row["cache bytes"]


def test_a_bill_predicts_a_packed_cache():
    each = racer("kvist kivi:2", "kivi:2")
    assert measure(tiny_llama(), each, 2, LENGTHS)["cache bytes"] == each.cache_bytes(2)


def test_a_contender_that_fails_is_a_row_that_says_why(capsys, tmp_path):
    methods = {"kvquant:2": parse("kvquant:2"), "kivi:2": parse("kivi:2")}  # a table that nobody fitted
    race = Race(Lengths(40, 3), 150 * MIB, most=2)
    report = throughput.run(tiny_llama(), methods, "tiny", race, plot=tmp_path / "t.png")
    failed = [row for row in report["rows"] if "failed" in row]
    assert [(row["contender"], row["batch"]) for row in failed] == [("kvist kvquant:2", 1)]
    assert failed[0]["failed"].startswith("ValueError: kvquant needs")
    assert len([row for row in report["rows"] if "tokens/s" in row]) == 2 * 4
    printed = capsys.readouterr().out
    assert "failed: ValueError" in printed and "largest batch of kvist kivi:2: 2 measured" in printed
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)


def test_an_interruption_keeps_what_was_measured(monkeypatch, tmp_path):
    def interrupted(model, racer, batch, *rest):
        if batch == 4:
            raise KeyboardInterrupt
        return faked(lambda racer, batch: MIB)(model, racer, batch, *rest)

    monkeypatch.setattr(throughput, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        throughput.run(tiny_llama(), {}, "tiny", Race(Lengths(40, 9), 90 * MIB), out=tmp_path / "t.json")
    kept = json.loads((tmp_path / "t.json").read_text())
    assert kept["interrupted"] and [row["batch"] for row in kept["rows"]] == [1, 1, 1, 2, 2, 2]
    assert {entry["measured"] for entry in kept["largest"]} == {2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(path)
    return str(path)


def call(*words: str, code: int = 0):
    result = CliRunner().invoke(app, ["bench", "throughput", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_command(folder, tmp_path):
    lengths = ("--prompt-tokens", "40", "--new-tokens", "5", "--batch", "2", "--memory", "256MiB")
    out = tmp_path / "t.json"
    ran = call(folder, "--preset", "kivi", *lengths, "--json", "--out", str(out), "--plot", str(tmp_path / "t.png"))
    report = json.loads(ran.stdout)
    assert report == json.loads(out.read_text())
    assert report["settings"]["memory bytes"] == 256 * MIB and report["machine"]["omp_wait_policy"]
    assert {row["method"] for row in report["rows"]} == {"", "kivi:2", "kivi:4"}
    changed = f"Changed here: {folder}, not llama-2-7b; 2 layers, not 32; 40 + 5 tokens, not 160 + 338."
    assert report["published"]["differs"].endswith(changed)
    assert [claim["published"][:4] for claim in report["published"]["claims"]] == ["2.6x", "up t", "2.35"]
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)
    printed = call(folder, *lengths, "--method", "int4").stdout
    assert "kvist int4" in printed and "kivi" not in printed and "published" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give a MODEL, --random-weights"),
        (("MODEL", "--random-weights", "llama-2-7b"), "give one of them"),
        (("--preset", "kiwi"), "did you mean 'kivi'?"),
        (("--random-weights", "lama-2-7b"), "did you mean 'llama-2-7b'?"),
        (("MODEL", "--layers", "2"), "--layers cuts --random-weights"),
        (("MODEL", "--memory", "10G"), "expected bytes such as '10GiB'"),
        (("MODEL", "--memory", "900TB"), "GiB are free beside the weights"),
        (("MODEL", "--memory", "64KiB"), "too few for a batch of 1"),
        (("MODEL", "--prompt-tokens", "9000"), "knows 8192 positions"),
        (("MODEL", "--method", "kiwi"), "did you mean 'kivi'?"),
        (("MODEL", "--dtype", "int8"), "--dtype is one of"),
        (("--random-weights", "llama-3-70b", "--device", "nowhere"), "--device 'nowhere' cannot be used"),
    ],
)
def test_refusals(words, said, folder, tmp_path):
    out = tmp_path / "t.json"
    result = call(*(folder if word == "MODEL" else word for word in words), "--out", str(out), code=2)
    assert result.stdout == "" and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert not out.exists()


def test_weights_that_do_not_fit_are_not_made(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 20 * MIB)
    assert "give --layers 2, or fewer" in call("--random-weights", "llama-3-70b", code=2).stderr


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ("--random-weights", "llama-2-7b", "--plot", str(tmp_path / "t.png"))
    assert "--plot needs matplotlib" in call(*words, code=2).stderr


def test_grouped_heads_on_a_cpu_have_the_masked_setting_too():
    assert [each.name for each in contenders(tiny_llama(kv_heads=4), {}, LENGTHS)] == ["dynamic, SDPA", "static, SDPA"]
    padded = racer("dynamic, SDPA, one padding slot")
    seen = []
    model = tiny_llama()
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["attention_mask"]), with_kwargs=True
    )
    try:
        generation.generate(model, padded, padded.make(), prompts(model, 2, 6, 0), 2)
    finally:
        hook.remove()
    assert [mask[:, 0].tolist() for mask in seen] == [[0, 0]] * 2 and all(mask[:, 1:].all() for mask in seen)
