"""The kernel benchmark and the GPU's one command run end to end in Triton's interpreter; nothing is timed there."""

import itertools
import json

import kernels_interpreted  # noqa: F401  # before the benchmarks
import pytest
import torch
from transformers import DynamicCache

from benchmarks import device_time, end_to_end, goals, gpu, headline, kernel_contenders, kernel_gate, kernels, roofline
from benchmarks.kernel_storage import Shape, filled, kernel, queries, read, step, twins
from benchmarks.standing import standing
from kvist.kernels.reference.attend import attend
from kvist.models.compat import cache_argument

pytest.importorskip("triton")

CPU = torch.device("cpu")
TIMES = {
    "median us",
    "p10 us",
    "p90 us",
    "GB/s",
    "x floor",
    "x fp16",
    "x fp8",
    "x copy",
    "ms/token",
    "ms/step",
    "tokens/s",
}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def brief(monkeypatch):
    """A gate of few checks."""
    monkeypatch.setattr(kernel_gate, "GROUPS", (1,))
    monkeypatch.setattr(kernel_gate, "SIZES", ())
    monkeypatch.setattr(kernel_gate, "lengths", lambda page: (1, 100))


class Watch:
    """A replay without a graph: it runs its turns once, and says that they took a microsecond more each time."""

    def __init__(self, turns):
        self.count = itertools.count(1)
        for turn in turns:
            turn()

    def seconds(self):
        return next(self.count) / 1e6


@pytest.mark.parametrize(("text", "tokens"), [("32/8:128K", 1 << 17), ("28/4:4096@64", 4096), ("32/32:32Kx8", 1 << 18)])
def test_shapes_have_names(text, tokens):
    shape = Shape.parse(text)
    assert shape.tokens == sum(shape.lengths) == tokens
    assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "8/32", "7/3:1K", "8/0:1K", "8/8:0", "8/8:1Kx0", "8/8:1G"])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"expected a shape|divide"):
        Shape.parse(text)


def test_ragged_rows_are_as_many_tokens_in_all():
    lengths = Shape(8, 8, 1000, 8, variant="ragged").lengths
    assert sum(lengths) == 8000 and min(lengths) < 40 and max(lengths) > 3500


@pytest.mark.parametrize("variant", ["", "shuffled", "ragged"])
@pytest.mark.parametrize("method", ["kivi:2", "kvquant:3"])
def test_both_references_agree_wherever_pages_lie(method, variant):
    shape = Shape(4, 2, 260, 2, 32, variant)
    layer, q = filled(method, shape, CPU), queries(shape, CPU)
    assert layer.lengths == shape.lengths
    expected = kernel_gate.over_tiles(layer, q, 0.2)
    assert kernel_gate.error(step(layer, q, 0.2), expected) < kernel_gate.TOLERANCE
    if variant != "ragged":
        assert kernel_gate.error(kernel_gate.over_dense(layer, q, 0.2), expected) < 1e-5


def test_pages_in_other_places_are_the_same_cache():
    shape = Shape(2, 1, 400, 2, 32)
    a, b = (filled("kivi:4", Shape(2, 1, 400, 2, 32, variant), CPU) for variant in ("", "shuffled"))
    assert a.key.pool.tables != b.key.pool.tables and read(a) == read(b)
    q = queries(shape, CPU)
    assert torch.equal(kernel_gate.over_dense(a, q, 1.0), kernel_gate.over_dense(b, q, 1.0))


@pytest.mark.parametrize("method", ["kivi:2", "kivi:4 group=128", "kvquant:4"])
def test_large_shapes_are_continued_by_copies_of_their_pages(method, interpreted):
    shape = Shape(2, 1, 2100, 1, 32)
    whole, continued = filled(method, shape, CPU), filled(method, shape, CPU, written=700)
    assert continued.lengths == whole.lengths == [2100] and continued.slots == 2100
    for a, b in zip(whole.tracks, continued.tracks, strict=True):
        assert a.frontiers == b.frontiers and len(a.pool.tables[0]) == len(set(b.pool.tables[0]))
    assert read(whole) == read(continued)
    q = queries(shape, CPU)
    expected = kernel_gate.over_dense(continued, q, 0.2)
    assert kernel_gate.error(step(continued, q, 0.2), expected) < kernel_gate.TOLERANCE
    continued.rows.extend(1, 200, None)  # and it lives on
    continued.update(*torch.randn(2, 1, 1, 200, 32).half())
    expected = kernel_gate.over_dense(continued, q, 0.2)
    assert kernel_gate.error(step(continued, q, 0.2), expected) < kernel_gate.TOLERANCE


def test_copies_share_no_page():
    layer = filled("kivi:2", Shape(2, 1, 300, 1, 32), CPU)
    found = twins(layer, 3)
    pointers = {each.key.pool.arrays["codes"].data_ptr() for each in found}
    q = queries(Shape(2, 1, 300, 1, 32), CPU)
    assert len(pointers) == 3
    assert all(torch.equal(step(each, q, 0.2), step(layer, q, 0.2)) for each in found)


@pytest.mark.parametrize(("group", "length", "dim"), [(1, 1, 64), (4, 200, 128), (7, 300, 96)])
def test_the_fp16_kernel_is_attention(group, length, dim):
    from benchmarks.split_triton import attend as attend_fp16

    q, (k, v) = torch.randn(2, 2 * group, 1, dim).half(), torch.randn(2, 2, 2, length, dim).half()
    expected = attend(q, k, v, dim**-0.5).out
    assert kernel_gate.error(attend_fp16(q, k, v, dim**-0.5), expected) < 1e-3
    assert kernel_gate.error(kernel_gate.over_tensors(q, k, v, dim**-0.5), expected) < 1e-6


def test_attention_in_fp16_is_off_by_roundings_of_its_operands():
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 90, 64), torch.randn(1, 2, 90, 64)
    seen = torch.arange(90).view(1, 1, 1, 90) < 70
    exact, half = attend(q, k, v, 0.125, seen), kernel_gate.rounded(q, k, v, 0.125, seen)
    error = kernel_gate.error(half.out, exact.out)
    assert 0 < error < 8 * 2**-11 and (half.lse - exact.lse).abs().max() < 8 * 2**-11
    assert kernel_gate.limit(error) == kernel_gate.TOLERANCE and kernel_gate.limit(1e-3) == 4e-3
    alike = kernel_gate.rounded(*(x.half().float() for x in (q, k, v)), 0.125, seen)
    assert torch.equal(alike.out, half.out)


@pytest.mark.parametrize("method", ["kivi:2", "kvquant:3 keys=pre-rope"])
def test_the_gate_goes_through_lengths_sizes_groups_and_configurations(method, interpreted):
    names = [name for name, _ in kernel_gate.cases(method, CPU, True, 32)]
    assert len(names) == len(set(names)) and "1 tokens" in names and "numbers of about 1000" in names
    assert (
        sum("configuration" in name for name in names)
        == len(kernel_gate.configurations(kernel(filled(method, Shape(1, 1, 1), CPU)).run))
        == 2
    )
    notes = []
    found = kernel_gate.gate(method, CPU, toy=True, dim=32, note=notes.append)
    assert found["kernel"] == "triton.decode.decode" and "failed" not in found and "unfinished" not in found
    assert 0 < found["error"] <= kernel_gate.TOLERANCE
    assert len(notes) == found["checks"] and notes[0]["unfinished"]


def test_a_wrong_kernel_is_not_timed(interpreted, brief, monkeypatch):
    monkeypatch.setattr(kernel_gate, "step", lambda layer, q, scale: 1.01 * step(layer, q, scale))
    found = kernel_gate.gate("kivi:4", CPU, toy=True, dim=32)
    assert "error" in found["failed"]
    rows = kernels.race(Shape(1, 1, 200), ["kivi:4"], CPU, 0, True, {"kivi:4": found["failed"]}, None)
    row = next(row for row in rows if row["contender"] == "kvist kivi:4")
    assert "gate" in row["failed"] and "error" not in row
    monkeypatch.setattr(kernel_contenders.kernel_storage, "step", lambda layer, q, scale: q * torch.nan)
    rows = kernels.race(Shape(1, 1, 200), ["kivi:4"], CPU, 0, True, {}, None)
    assert "error inf" in next(row for row in rows if row["contender"] == "kvist kivi:4")["failed"]


def test_kernels_at_toy_sizes_say_who_served_and_no_times(interpreted, brief, tmp_path, capsys):
    out = tmp_path / "runs" / "kernels.json"
    report = kernels.run(["32/8:128K@32", "2/2:70@64"], ["kivi:2"], out=out, as_json=True)
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out) == json.loads(json.dumps(report))
    rows = report["rows"]
    assert not any(TIMES & row.keys() for row in rows + report["packing"])
    assert {row["device"] for row in rows} == {"interpreter"}
    assert {row["shape"] for row in rows if "variant" not in row} == {"8/2:300@32", "2/2:70@64"}
    served = {row["contender"]: row.get("kernel") for row in rows if "failed" not in row}
    assert served["kvist kivi:2"] == "triton.decode.decode" and "split-KV, Triton" in served
    assert [row["variant"] for row in rows if "variant" in row] == ["in order", "shuffled", "ragged"]
    failed = {row["contender"]: row["failed"] for row in rows if "failed" in row}
    assert all("not installed" in failed[name] for name in failed if "Flash" in name)
    assert [row["side"] for row in report["packing"]] == ["keys", "values"]


def test_a_plot_without_times_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without a GPU nothing is timed"):
        kernels.run(methods=["kivi:2"], device="cpu", plot=tmp_path / "x.png")


def test_without_the_interpreter_rows_are_of_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = filled("kivi:2", Shape(1, 1, 1), CPU)
    assert kernel(layer).name in ("numba.bound.attend_pages", "reference") and device_time.label(CPU) == "cpu"
    rows = kernels.race(Shape(1, 1, 30), [], CPU, 0, True, {}, None)
    assert "TRITON_INTERPRET" in next(row["failed"] for row in rows if row["contender"] == "split-KV, Triton")


def test_timed_rows_are_compared_with_the_best_of_fp16(monkeypatch, tmp_path):
    monkeypatch.setattr(device_time, "Replay", Watch)
    rows = kernels.race(Shape(2, 1, 200), ["kivi:2"], CPU, 11, True, {}, 1e9)
    timed = [row for row in rows if "median us" in row]
    assert {row["kind"] for row in timed} == {"fp16", "kvist"}
    for row in timed:
        assert row["p10 us"] <= row["median us"] <= row["p90 us"]
        assert row["x floor"] == pytest.approx(row["median us"] / (1e3 * row["MB"]))
    assert max(row["x fp16"] for row in timed if row["kind"] == "fp16") == 1.0
    varied = kernels.variants_of(["kivi:2"], CPU, 3, True, 1e9)
    assert varied[0]["x in order"] == 1.0 and all("x in order" in row for row in varied)
    report = {"title": "Toy", "settings": {"rounds": 11}, "read GB/s": 1.0, "rows": rows + varied}
    assert "x fp16, of ours" in kernels.sentences(report)[1]
    pytest.importorskip("matplotlib")
    roofline.draw(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="no times"):
        roofline.draw(report | {"rows": []}, tmp_path / "y.png")


def test_a_standing_cache_is_a_cache_without_its_oldest_token():
    model = end_to_end.model_of("llama-3-8b", CPU, True, 100)
    cache, (token, at) = standing(1, (1, 32), 40, CPU), torch.tensor([[[3]], [[40]]])
    with torch.no_grad():
        found = model(input_ids=token, position_ids=at, **cache_argument(cache)).logits
        again = model(input_ids=token, position_ids=at, **cache_argument(cache)).logits
        grown = DynamicCache()
        grown.update(*(x[:, :, :40].clone() for x in (cache.layers[0].keys, cache.layers[0].values)), 0)
        expected = model(input_ids=token, position_ids=at, **cache_argument(grown)).logits
    assert torch.equal(found, again) and torch.equal(found, expected)


def test_one_layer_copied_is_a_layer_filled_alike():
    config = end_to_end.config("llama-2-7b", True, 400)
    config.num_hidden_layers = 2
    model = headline.random_weights(config, torch.float16, "cpu")
    cache = headline.Cache(model, headline.stand_in(headline.parse(headline.METHOD), 1, 32), reserve=400)
    assert headline._fill(cache, (1, 32), 300, CPU, patience=-1.0) == 1
    a, b = (kernel_gate.View.after(layer) for layer in cache.inner.ours)
    assert all(torch.equal(a.dense(side), b.dense(side)) for side in (0, 1))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3]]), **cache_argument(cache))
    assert cache.inner.ours[1].lengths == [301]


def test_goals_are_judged_by_the_worst_and_say_what_is_missing():
    shapes = ("32/32:128K", "32/32:32Kx8", "32/8:4K")
    ratios = (3.5, 3.1, 0.9)
    rows = [
        {"shape": shape, "contender": "kvist kivi:4 group=128", "x fp16": ratio}
        for shape, ratio in zip(shapes, ratios, strict=True)
    ]
    packing = [{"x copy": 0.7}, {"x copy": 0.65}]
    found = {row["goal"]: row for row in goals.judge({"kernels": {"rows": rows}, "variants": {"packing": packing}})}
    mha = found["MHA 32/32, 128K tokens and more: 4 bit g128, x fp16"]
    assert (mha["measured"], mha["met"]) == ("3.1", "yes")
    assert found["least: 128K tokens and more: 4 bit g128, x fp16"]["met"] == "yes"
    assert found["GQA 32/8, 4K, batch 1: 4 bit g128, x fp16"]["met"] == "no"
    assert found["packing: x copy"]["met"] == "yes"
    assert found["4 bit g128, large: x FP8"]["met"] == "not measured"


def test_everything_runs_end_to_end_on_a_cpu(interpreted, brief, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "TOY_SHAPES", ("2/1:180@64",))
    monkeypatch.setattr(kernels, "VARIED", ())
    (tmp_path / "kernels.json").write_text("{}")  # of an earlier run
    report = gpu.run(tmp_path, device="cpu")
    states = {row["stage"]: row["state"] for row in report["stages"]}
    assert set(states) == set(gpu.STAGES)
    assert all(state == "done" or "need" in state for state in states.values()), states
    for name in gpu.STAGES:
        rows = json.loads((tmp_path / f"{name}.json").read_text()).get("rows", [])
        assert not any(TIMES & row.keys() for row in rows)
        if name in ("captured", "generate", "headline"):
            assert rows and not any("failed" in row for row in rows), rows
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == report["rows"]
    assert {row["met"] for row in report["rows"] if "angles" not in row["goal"]} == {"not measured"}
    capsys.readouterr()


def test_stages_fail_alone_and_time_ends(tmp_path, monkeypatch, capsys):
    def broken(path, device, methods):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(
        gpu, "STAGES", {"environment": (gpu.environment, 9), "unpack": (broken, 9), "tests": (gpu.tests, 9)}
    )
    states = [row["state"] for row in gpu.run(tmp_path, device="cpu")["stages"]]
    assert states[:2] == ["done", "failed: RuntimeError: no such thing"] and "need" in states[2]
    states = {row["state"] for row in gpu.run(tmp_path, budget_seconds=0, device="cpu")["stages"]}
    assert states == {"skipped: the budget is spent"} and not (tmp_path / "environment.json").exists()
    with pytest.raises(ValueError, match="plans are"):
        gpu.run(tmp_path, device="cpu", plan="some")


def test_a_part_keeps_what_earlier_calls_measured(tmp_path, monkeypatch, capsys):
    row = {"shape": "32/8:4K", "contender": "kvist kivi:2", "kernel": "attend_cuda", "median us": 9.0, "x fp16": 1.2}
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [row | {"GB/s": 300.0}]}))
    monkeypatch.setattr(gpu, "PLANS", {"all": (), "check": ("environment",)})
    report = gpu.run(tmp_path, device="cpu", plan="check")
    assert [stage["stage"] for stage in report["stages"]] == ["environment"]
    page = (tmp_path / "SUMMARY.md").read_text()
    assert (
        "GQA 32/8, 4K, batch 1: 2 bit g32, x fp16 | at least 1.1 | 1.2 | yes" in page and "| 9.0 | 1.20 | 300 |" in page
    )
    capsys.readouterr()


def test_a_stage_apart_is_stopped_at_its_limit_and_leaves_word(tmp_path):
    assert gpu._apart("unpack", tmp_path, "cpu", [], 120) == "done"
    assert "need" in gpu._read(tmp_path, "unpack")["skipped"]
    assert "stopped after" in gpu._apart("generate", tmp_path, "cpu", ["kivi:2"], 0.2)


def test_a_method_whose_gate_died_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "false")  # whatever it is asked
    assert "gate-0 failed" in gpu._apart("gate", tmp_path, "cpu", ["kivi:2"], 60)
    row = gpu._read(tmp_path, "gate")["rows"][0]
    assert row["method"] == "kivi:2" and "failed" in row
