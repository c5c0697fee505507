"""From a model and windows to an artefact: ladders, refusals, and a model left as it was."""

import copy

import pytest
import torch
from families.zoo import tiny
from models_tiny import tiny_llama, tokens

from kvist.artifact import Artifact, Settings
from kvist.calibrate.run import calibrate, observe
from kvist.calibrate.state import State
from kvist.calibrate.tables import evenly, normal_float

WINDOWS = tokens(3, 25, seed=5)
SHARE = 0.1  # of 32 channels: 3.2, so 4 slots


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("levels", ["nf", "int", "nuq"])
def test_ladders(levels, bits, tmp_path):
    settings = Settings(bits=bits, levels=levels, sensitivity="none")
    found = calibrate(
        tiny("llama", "sdpa"), WINDOWS, settings, source="a", digest="b", seed=3, folder=tmp_path, qnorm="off"
    )
    assert found == Artifact.load(tmp_path) and found.on_grid == (
        levels == "nuq" or f"{levels}{bits}" in ("int2", "int4")
    )
    assert (found.origin.source, found.origin.samples, found.origin.seqlen, found.origin.seed) == ("a", 3, 25, 3)
    tables = [fit.table for fit in (*found.keys, *found.values)]
    assert all(table.bits == bits and table.read is None for table in tables)
    if levels == "nuq":
        assert len({table.points for table in tables}) == 4
    else:
        wanted = torch.tensor({"nf": normal_float, "int": evenly}[levels](bits))  # fp32, as they are looked up
        assert all(torch.equal(table.tables(wanted.device)[1], wanted) for table in tables)


@pytest.mark.parametrize(
    ("settings", "seqlen", "words"),
    [
        (Settings(bits=3, sinks=24), 25, "windows of 25 tokens leave nothing behind 24 sinks"),
        (Settings(bits=3, outliers=0.49), 25, "outliers per token"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_leaves_nothing(settings, seqlen, words, tmp_path):
    model = tiny("llama", "sdpa") if settings.sinks > 1 else tiny_llama(kv_heads=4, dim=160)
    shown = []
    hook = model.register_forward_pre_hook(lambda *args: shown.append(1))
    try:
        with pytest.raises(ValueError, match=words):
            calibrate(model, WINDOWS[:, :seqlen], settings, source="", digest="", seed=0, folder=tmp_path / "out")
    finally:
        hook.remove()
    assert not (tmp_path / "out").exists() and len(shown) <= 1  # a short look at its rotary embedding


def test_a_model_in_training_is_looked_at_in_evaluation_mode(tmp_path):
    model = copy.deepcopy(tiny("llama", "sdpa"))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    quiet = Settings(bits=3, outliers=SHARE)
    model.train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    noisy = observe(model, WINDOWS, quiet, State(tmp_path, "a"))
    assert [part.training for part in model.modules()] == modes
    calm = observe(tiny("llama", "sdpa"), WINDOWS, quiet, State(tmp_path, "b"))
    assert noisy.ranges == calm.ranges
    assert all(torch.equal(a.to_tensor(), b.to_tensor()) for a, b in zip(noisy.keys, calm.keys, strict=True))


def test_a_head_that_is_not_known_is_refused_before_anything_else(tmp_path):
    model, lengths = copy.deepcopy(tiny_llama()), []
    inner = model.forward

    def doubling(*args, **kwargs):
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        lengths.append(next(x.shape[1] for x in given if x is not None))
        out = inner(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubling
    with pytest.raises(ValueError, match="--sensitivity none"):
        calibrate(model, WINDOWS, Settings(bits=3), source="", digest="", seed=0, folder=tmp_path / "out")
    assert WINDOWS.shape[1] not in lengths and not (tmp_path / "out").exists()
    settings = Settings(bits=3, sensitivity="none")
    assert calibrate(model, WINDOWS, settings, source="", digest="", seed=0, folder=tmp_path / "out").keys
