"""Where a layer's storage lives: on the device of its keys, whoever placed the model's parts."""

import pytest
import torch
from accelerate import dispatch_model
from models_tiny import llama_config, sharpen, tokens
from transformers import LlamaForCausalLM

import kvist
from kvist.cache.layer import Layer
from kvist.models.compat import cache_argument


def llama() -> LlamaForCausalLM:
    return sharpen(LlamaForCausalLM._from_config(llama_config(), dtype=torch.float32))


def storage(layer: Layer) -> list[torch.Tensor]:
    """Every tensor that a layer owns."""
    found = []
    for track in layer.tracks:
        found += [*track.pool.arrays.values(), track.pool.table(layer.table_width(track))]
        found += [track.exact.ring, track.exact.sinks, track.exact.pinned]
    return found


@pytest.mark.parametrize("method", ["exact", "kivi:2 recent=32 sinks=2", "logquant window=32"])
def test_storage_is_made_on_the_device_of_the_keys(method):
    model = llama()
    cache, seen = kvist.Cache(model, method), {}
    update = cache.update

    def spied(keys, values, layer_idx, *args, **kwargs):
        seen[layer_idx] = keys.device
        return update(keys, values, layer_idx, *args, **kwargs)

    cache.update = spied
    with torch.no_grad():
        model(tokens(1, 150), **cache_argument(cache))
    for i, layer in enumerate(cache.inner.ours):
        assert layer.device == seen[i]
        assert {tensor.device for tensor in storage(layer)} == {seen[i]}
    assert not any(isinstance(value, torch.Tensor) for value in vars(cache).values()), "nothing is shared over devices"


def test_layers_are_placed_one_by_one():
    """Two layers of one cache on two devices: each allocates where its own keys are."""
    cache = kvist.Cache(llama(), "kivi:2 recent=32")
    layer, twin = cache.inner.ours
    cache.inner.rows.extend(1, 10, None)
    layer.update(torch.randn(1, 2, 10, 32), torch.randn(1, 2, 10, 32))
    twin.lazy_initialization(*(torch.empty(1, 2, 0, 32, device="meta") for _ in range(2)))
    assert {tensor.device.type for tensor in storage(layer)} == {"cpu"}
    assert {tensor.device.type for tensor in storage(twin)} == {"meta"}
    assert (layer.device.type, twin.device.type) == ("cpu", "meta")


@pytest.mark.parametrize("attached", [False, True])
def test_a_dispatched_model_gives_the_same_tokens(attached):
    options = {"max_new_tokens": 20, "do_sample": False}
    model, ids = llama(), tokens(1, 150)
    expected = model.generate(ids, **cache_argument(kvist.Cache(model, "kivi:2 recent=32")), **options)
    spread = {f"model.layers.{i}": "cpu" for i in range(2)}
    spread |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for device_map in ({"": "cpu"}, spread):
        placed = dispatch_model(llama(), device_map, force_hooks=True)
        assert any(hasattr(module, "_hf_hook") for module in placed.modules())
        if attached:
            kvist.attach(placed)
        found = placed.generate(ids, **cache_argument(kvist.Cache(placed, "kivi:2 recent=32")), **options)
        assert torch.equal(found, expected)
