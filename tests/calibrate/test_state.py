"""A calibration that is interrupted, anywhere, and started again: the same bytes, and nothing shown twice."""

import copy
from collections import Counter

import pytest
import torch
from models_tiny import tiny_llama, tokens
from safetensors.torch import save_file

from kvist.artifact import JSON, TENSORS, Settings
from kvist.calibrate import state as state_module
from kvist.calibrate.histogram import Histogram
from kvist.calibrate.run import calibrate
from kvist.calibrate.state import NAME, State

WINDOWS = tokens(4, 20, seed=3)
CAPPED = Settings(bits=2, outliers=0.05)
UNCAPPED = Settings(bits=3, outliers=0.1, cap="none", sensitivity="none")
STAGES = {
    "capped": (CAPPED, ("thresholds", "capped thresholds", "tables")),
    "uncapped": (UNCAPPED, ("thresholds", "tables")),
}


@pytest.fixture(autouse=True)
def _saved_at_every_sample(monkeypatch):
    monkeypatch.setattr(state_module, "EVERY", -1.0)


class Stop(Exception):
    """Somebody pulled the plug."""


def run(folder, settings=CAPPED, model=None, windows=WINDOWS, progress=lambda *done: None, qnorm="auto") -> Counter:
    """How often each window was shown to the model."""
    shown: Counter = Counter()
    model = model or tiny_llama()

    def count(module, args, kwargs):
        x, embedded = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if x is None and embedded is not None:
            same = embedded[0].unsqueeze(1) == module.get_input_embeddings().weight
            x = same.all(-1).int().argmax(-1).unsqueeze(0)
        if x is not None and x.shape[1] == windows.shape[1]:  # others try whether the model can serve
            shown[tuple(x[0].tolist())] += 1

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        calibrate(
            model, windows, settings, source="s", digest="d", seed=0, folder=folder, qnorm=qnorm, progress=progress
        )
    except Stop:
        assert (folder / NAME).exists()
    finally:
        hook.remove()
    return shown


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_at(*where):
    def progress(*done):
        if done[:2] == where:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of uninterrupted runs, and how often a window is shown in all."""
    made = {}
    for name, (settings, stages) in STAGES.items():
        folder = tmp_path_factory.mktemp(name)
        shown = run(folder, settings)
        assert shown == {tuple(window.tolist()): len(stages) for window in WINDOWS}
        made[name] = files(folder)
        assert made[name].keys() == {JSON, TENSORS}  # no progress is left behind
    return made


@pytest.mark.parametrize("samples", [1, 3, 4])
@pytest.mark.parametrize(("name", "stage"), [(n, stage) for n, (_, stages) in STAGES.items() for stage in stages])
def test_interrupted_between_samples(name, stage, samples, whole, tmp_path):
    settings, stages = STAGES[name]
    first = run(tmp_path, settings, progress=stop_at(stage, samples))
    assert files(tmp_path).keys() == {NAME}
    done = 4 * stages.index(stage) + samples
    assert first.total() == done
    second = run(tmp_path, settings)
    assert files(tmp_path) == whole[name]
    assert second.total() == 4 * len(stages) - done
    assert set((first + second).values()) == {len(stages)}


@pytest.mark.parametrize("stage", ["fit keys", "fit values"])
def test_interrupted_while_fitting(stage, whole, tmp_path):
    run(tmp_path, progress=stop_at(stage, 1))
    assert not run(tmp_path)
    assert files(tmp_path) == whole["capped"]


@pytest.mark.parametrize("call", [1, 3, 6, 11])
def test_interrupted_within_a_sample(call, whole, tmp_path, monkeypatch):
    """What the layers of half a sample have added is not kept."""
    add, calls = Histogram.add, []

    def failing(*args):
        calls.append(1)
        if len(calls) == call:
            raise Stop
        return add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Histogram, "add", failing)
        first = run(tmp_path)
    second = run(tmp_path)
    assert files(tmp_path) == whole["capped"]
    assert (first + second).total() == 13  # one was shown twice: the one that was not finished


def test_interrupted_again_and_again(whole, tmp_path):
    for stage in STAGES["capped"][1]:
        for samples in range(1, 5):
            assert run(tmp_path, progress=stop_at(stage, samples)).total() == 1
    assert not run(tmp_path)
    assert files(tmp_path) == whole["capped"]


def fine_tuned():
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.add_(0.01)
    return model


@pytest.mark.parametrize(
    "other",
    [
        {"settings": CAPPED.model_copy(update={"sinks": 2})},
        {"settings": CAPPED.model_copy(update={"outliers": 0.1})},
        {"settings": CAPPED.model_copy(update={"sensitivity": "fisher"})},
        {"settings": CAPPED.model_copy(update={"keys": "post-rope"})},
        {"windows": tokens(4, 20, seed=4)},
        {"windows": WINDOWS.view(5, 16)},
        {"model": fine_tuned()},
        {"model": copy.deepcopy(tiny_llama()).bfloat16()},
    ],
    ids=["sinks", "outliers", "sensitivity", "keys", "windows", "cut otherwise", "weights", "dtype"],
)
def test_progress_of_another_run_is_not_used(other, tmp_path):
    run(tmp_path / "clean", **other)
    run(tmp_path / "used", progress=stop_at("tables", 3))
    shown = run(tmp_path / "used", **other)
    assert shown.total() == 3 * len(other.get("windows", WINDOWS))
    assert files(tmp_path / "used") == files(tmp_path / "clean")


def test_the_dtype_counts_where_weights_are_the_same_numbers(tmp_path):
    half = copy.deepcopy(tiny_llama()).bfloat16()
    run(tmp_path, model=copy.deepcopy(half).float(), progress=stop_at("tables", 3))
    assert run(tmp_path, model=half).total() == 12


def test_progress_does_for_other_ladders(tmp_path):
    """What was seen is the same whatever is fitted to it."""
    other = CAPPED.model_copy(update={"bits": 4, "levels": "nf"})
    run(tmp_path / "used", progress=stop_at("tables", 4))
    run(tmp_path / "clean", other)
    assert not run(tmp_path / "used", other)
    assert files(tmp_path / "used") == files(tmp_path / "clean")


@pytest.mark.parametrize("damage", ["torn", "empty", "text", "foreign"])
def test_a_torn_file_is_no_progress(damage, whole, tmp_path):
    run(tmp_path, progress=stop_at("tables", 2))
    path = tmp_path / NAME
    if damage == "foreign":
        save_file({"high.0": torch.zeros(3)}, path)
    else:
        path.write_bytes({"torn": path.read_bytes()[:-100], "empty": b"", "text": b"{}" * 99}[damage])
    assert run(tmp_path).total() == 12
    assert files(tmp_path) == whole["capped"]


def test_a_state_is_saved_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "EVERY", 3600.0)
    state = State(tmp_path / "new", "key")
    state.tensors["a"] = torch.arange(6).view(2, 3).T
    state.step("one", 1)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(state_module, "EVERY", -1.0)
    state.step("one", 2)
    again = State(tmp_path / "new", "key")
    assert again.done == {"one": 2} and torch.equal(again.tensors["a"], state.tensors["a"])
    assert not State(tmp_path / "new", "another").tensors
    again.clear()
    again.clear()
    assert not list((tmp_path / "new").iterdir())
