"""What throughput stands on: peaks and free memory, known shapes with random weights, and what papers published."""

import sys

import pytest
import torch

from kvist.bench import memory, presets, shapes
from kvist.methods import parse

CPU, MIB = torch.device("cpu"), 1 << 20


def test_peak_of_a_known_allocation():
    def work():
        for _ in range(3):  # one at a time: the peak is that of one
            torch.ones(96 * MIB, dtype=torch.uint8)
        return "done"

    done, high = memory.peak(work, CPU)
    assert done == "done"
    if not sys.platform.startswith("linux") or high is None:
        pytest.skip("this system does not tell a process its peak")
    assert 90 * MIB < high < 130 * MIB


def test_free_heeds_control_groups(tmp_path, monkeypatch):
    """Version 2, nested: the parent leaves 700 bytes and 100 that are only files, the child has no limit."""
    root, mine = tmp_path / "cgroup", tmp_path / "mine"
    (root / "a" / "b").mkdir(parents=True)
    for folder, limit, used, files in (("a", "1000", "300", 100), ("a/b", "max", "200", 0)):
        (root / folder / "memory.max").write_text(limit + "\n")
        (root / folder / "memory.current").write_text(used + "\n")
        (root / folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\n")
    mine.write_text("0::/a/b\n")
    assert memory._allowances(root, mine) == [800]
    mine.write_text("0::/elsewhere\n")
    assert memory._allowances(root, mine) == [sys.maxsize]
    (root / "memory").mkdir()
    for name, text in (("limit_in_bytes", "500"), ("usage_in_bytes", "450"), ("stat", "inactive_file 0\n")):
        (root / "memory" / f"memory.{name}").write_text(text)
    mine.write_text("4:memory:/gone\n1:cpu:/\n")
    assert memory._allowances(root, mine) == [50]
    monkeypatch.setattr(memory, "_allowances", lambda: [4096])
    assert memory.free(CPU) == 4096


def test_free_without_psutil(monkeypatch):
    with_it = memory._available()
    monkeypatch.setitem(sys.modules, "psutil", None)
    if sys.platform.startswith("linux"):
        assert memory._available() == pytest.approx(with_it, rel=0.5)
    monkeypatch.setattr(memory, "_fields", lambda path: {})
    with pytest.raises(ValueError, match="install psutil"):
        memory._available()


@pytest.mark.parametrize(
    ("layers", "high", "name"), [(32, 6, "kvmix k2.19v2.38"), (40, 8, "kvmix k2.20v2.40"), (2, 1, "kvmix k2.50v3.00")]
)
def test_the_published_allocation_of_kvmix(layers, high, name):
    texts = presets.PRESETS["kvmix"].methods(layers)
    assert list(texts) == [name, "kvmix:2"]
    plans = parse(texts[name]).for_layers(layers)
    widths = [(plan.key.codec.levels.bits, plan.value.codec.levels.bits) for plan in plans]
    assert widths == [(3, 4)] * high + [(2, 2)] * (layers - high)


def test_published_presets_parse_and_fit_their_models():
    for preset in presets.PRESETS.values():
        config = shapes.shape(preset.shape)
        assert preset.prompt + preset.new <= config.max_position_embeddings
        for text in preset.methods(config.num_hidden_layers).values():
            parse(text).for_layers(config.num_hidden_layers)


def test_claims_by_hand():
    def row(contender, batch, speed, peak):
        method = contender.removeprefix("kvist ") if contender.startswith("kvist") else ""
        return {"contender": contender, "method": method, "batch": batch, "tokens/s": speed, "peak bytes": peak}

    rows = [row("dynamic", 1, 10, 100), row("static", 1, 12, 120), row("kvist a", 1, 6, 50), row("dynamic", 2, 16, 300)]
    rows += [row("kvist a", 2, 14, 100), row("kvist a", 4, 24, 180), row("kvist b", 1, 4, None), {"contender": "x"}]
    ended = {"dynamic": True, "static": True, "kvist a": True, "kvist b": False}
    report = {"settings": {"weights bytes": 100}, "rows": rows}
    report["largest"] = [{"contender": name, "ended by memory": by} for name, by in ended.items()]
    kinds = (presets.PEAK, presets.PEAK_WITH_WEIGHTS, presets.BATCH, presets.SPEED)
    found = presets.compare(tuple(presets.Claim(kind, kind) for kind in kinds), report)
    assert [claim["ours"]["kvist a"] for claim in found] == [300 / 100, 400 / 200, 4 / 2, 24 / 16]
    assert [claim["ours"]["kvist b"] for claim in found] == [None, None, None, 4 / 16]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-2-7b", 6.738), ("llama-3-8b", 8.030), ("llama-3-70b", 70.554), ("mistral-7b", 7.248), ("qwen3-8b", 8.191)],
)
def test_shapes_have_as_many_weights_as_published(name, billions):
    model = shapes.outline(shapes.shape(name), torch.bfloat16)
    assert shapes.nbytes(model) / 2e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_random_weights(family, dtype, monkeypatch):
    own = {"model_type": family, "vocab_size": 97, "tie_word_embeddings": family == "qwen3"}
    monkeypatch.setitem(shapes.SHAPES, "tiny", (64, 96, 3, 4, 2, 1e4, own | {"max_position_embeddings": 100}))
    models = [shapes.random_weights(shapes.shape("tiny", 2), dtype, seed=seed) for seed in (1, 1, 2)]
    ids = torch.arange(50).unsqueeze(0)
    logits = [model(ids).logits.detach() for model in models]
    assert models[0].dtype == dtype and models[0].config.num_hidden_layers == 2
    assert all(each.isfinite().all() and each.std() > 0 for each in logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [
        ("llama-2-7", 0, "did you mean 'llama-2-7b'"),
        ("gpt", 0, "called 'gpt'; there are"),
        ("llama-2-7b", 33, "has 32 layers"),
    ],
)
def test_shapes_that_are_not_there(name, layers, words):
    with pytest.raises(ValueError, match=words):
        shapes.shape(name, layers)
