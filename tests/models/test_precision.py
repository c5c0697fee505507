"""Which type a CPU computes in, and in which its exact tokens are kept."""

import json
from copy import deepcopy

import pytest
import torch
from models_tiny import tiny_llama

import kvist
from kvist.models import precision


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own, and nothing remembered."""
    monkeypatch.setenv("KVIST_HOME", str(tmp_path))
    clear = precision.quick.cache_clear  # a test may put something else in its place
    clear()
    yield tmp_path
    clear()


@pytest.mark.parametrize(
    ("saved", "quick", "free", "found"),
    [
        (torch.bfloat16, False, 10**9, torch.float32),
        (torch.bfloat16, True, 10**9, torch.bfloat16),
        (torch.float16, False, 4 * 10**6, torch.float16),
        (torch.float16, False, 5 * 10**6, torch.float32),
        (torch.float32, False, 0, torch.float32),
    ],
)
def test_fp32_unless_the_processor_is_faster_or_memory_short(monkeypatch, saved, quick, free, found):
    monkeypatch.setattr(precision, "quick", lambda dtype: quick)
    assert precision.fast(saved, 10**6, free) == found


def test_a_processor_is_asked_then_timed_once_and_remembered(monkeypatch, home):
    timed = []
    monkeypatch.setattr(precision, "_faster", lambda dtype: not timed.append(dtype))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert not precision.quick(torch.bfloat16) and not timed
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for _ in range(2):
        precision.quick.cache_clear()
        assert precision.quick(torch.bfloat16)
    assert timed == [torch.bfloat16] and len(json.loads((home / "processor.json").read_text())) == 1
    (home / "processor.json").write_text("[")
    precision.quick.cache_clear()
    assert precision.quick(torch.bfloat16) and len(timed) == 2


def test_a_time_is_taken():
    assert isinstance(precision._faster(torch.bfloat16), bool)


def test_caches_of_a_suited_model_keep_what_its_weights_were_saved_in(monkeypatch):
    monkeypatch.setattr(precision, "quick", lambda dtype: False)
    model = precision.suit(deepcopy(tiny_llama()).to(torch.bfloat16), 10**9)
    assert model.dtype == model.config.dtype == torch.float32
    packs, plain = kvist.Cache(model, "kivi:2"), kvist.Cache(model, "exact")
    assert packs.inner.describes.shape.stored(True) == torch.bfloat16
    assert plain.inner.describes.shape.stored(False) == torch.float32
    precision.keep(model, None)
    assert kvist.Cache(model, "kivi:2").inner.describes.shape.stored(True) == torch.float32
