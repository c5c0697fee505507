"""Keys before RoPE: tagged, exact and gone without a trace; and undone by plain data read from any family."""

import copy
import sys

import pytest
import torch
import transformers
from families.zoo import COMMON, FAMILIES, tiny
from models_tiny import llama_config, tiny_llama, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvist.coding.transforms import Unrotate
from kvist.models import rope
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.models.rope import NAME, check, pre_rope, rotary, self_test, tagged

TAGGED = ["llama", "qwen3", "phi3", "cohere", "olmo2"]
# families outside the zoo: rotated channels sliced off first, interleaved and partial at once
SLICED = {"StableLm": {}, "Phi": {}}
MORE = {
    "Glm": {"head_dim": 16},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 16},
    **SLICED,
}


def build(name: str, changes: dict, dtype: torch.dtype = torch.float32):
    config = getattr(transformers, f"{name}Config")(**COMMON | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def llama(kind: str, **parameters) -> nn.Module:
    return build("Llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}})


def reference(key: Tensor, positions: list[int], found: Unrotate) -> Tensor:
    """Pairs of channels as complex numbers, turned one position and one pair at a time, in fp64."""
    out, pairs = key.double().clone(), len(found.frequencies)
    for t, position in enumerate(positions):
        for i, frequency in enumerate(found.frequencies):
            a, b = (i, i + pairs) if found.style == "half" else (2 * i, 2 * i + 1)
            angle = torch.tensor(position * frequency, dtype=torch.float64)
            turned = torch.complex(out[..., t, a], out[..., t, b]) * torch.polar(torch.ones_like(angle), angle)
            out[..., t, a], out[..., t, b] = turned.real * found.scaling, turned.imag * found.scaling
    return out


class Keys(DynamicCache):
    """Keeps what each layer's update was given."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.__dict__.setdefault("given", {})[layer_idx] = key_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def compare(model, positions: list[int]) -> None:
    """The plain data, through the slow reference, against what the model itself does at some positions."""
    found, cache = rotary(model), Keys(config=model.config)
    with tagged(model):
        model(
            tokens(1, len(positions)), position_ids=torch.tensor([positions]), **cache_argument(cache), use_cache=True
        )
    eps = torch.finfo(model.dtype).eps
    for layer in describe(model).served:
        key = cache.given[layer]
        before = pre_rope(key).key
        error = (reference(before, positions, found) - key.double()).abs().max()
        assert error <= (4 * eps + max(positions) * 2**-23) * before.abs().max() * found.scaling
        undone = found.forward(key, torch.tensor([positions]))
        assert (undone - before.float()).abs().max() <= (8 * eps + 1e-6) * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_data_turns_keys_as_the_model_does(family, dtype):
    model = tiny(family, FAMILIES[family][2][0], dtype)
    compare(model, [0, 1, 5, 60, 511])
    check(model, rotary(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MORE)
def test_families_that_slice_or_interleave_part_of_the_head(name, dtype):
    model = build(name, MORE[name], dtype)
    found = rotary(model)
    check(model, found)
    share = model.config.rope_parameters.get("partial_rotary_factor", 1.0)
    assert 2 * len(found.frequencies) == int(describe(model).shape.key_dim * share)
    assert found.style == ("interleaved" if name == "Glm" else "half")
    if name not in SLICED:  # where the tag survives
        compare(model, [0, 3, 200])


def test_the_data_of_a_default_embedding_are_the_textbook_ones():
    found = rotary(tiny_llama(dim=32))
    assert found.style == "half" and found.scaling == 1.0
    assert found.frequencies == pytest.approx([10000.0 ** (-i / 16) for i in range(16)], rel=1e-6)


def test_plain_data_are_equal_by_value_after_use():
    model = tiny_llama()
    found, again = rotary(model), rotary(model)
    for part in (found, again):  # each makes a table of its own
        part.inverse(torch.ones(1, 1, 1, 32), torch.ones(1, 1))
    assert found == again and hash(found) == hash(again)
    still = found.model_copy(update={"frequencies": (0.0,) * 16})
    assert still != found
    assert torch.equal(still.inverse(torch.ones(1, 1, 1, 32), torch.ones(1, 1)), torch.ones(1, 1, 1, 32))


def test_yarn_brings_its_scaling():
    found = rotary(tiny("llama-yarn", "sdpa"))
    assert found.scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)


def test_full_layers_of_a_mixed_model_have_their_own_base():
    bases = {"sliding_attention": 100.0, "full_attention": 1e6}
    parameters = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    found = rotary(build("Gemma3Text", {**FAMILIES["gemma3"][1], "rope_parameters": parameters}))
    assert found.frequencies == pytest.approx([1e6 ** (-i / 8) for i in range(8)], rel=1e-6)


@pytest.mark.parametrize("family", ["llama3-rope", "gemma3", "phi3"])
def test_models_without_weights_are_read_too(family):
    name, changes, _ = FAMILIES[family]
    with torch.device("meta"):
        empty = build(name, changes)
    assert all(buffer.is_meta for buffer in empty.buffers())
    assert rotary(empty) == rotary(tiny(family, FAMILIES[family][2][0]))
    with pytest.raises(ValueError, match="meta device"):
        check(empty, rotary(empty))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused_by_name(kind):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    model = llama(kind, factor=2.0, **(factors if kind == "longrope" else {}))
    with pytest.raises(ValueError, match=f"{kind} RoPE depend.*post-rope"):
        rotary(model)


def swapped(module: nn.Module) -> nn.Module:
    """A Llama with another rotary module."""
    model = copy.deepcopy(tiny_llama())
    model.model.rotary_emb = module
    return model


class Growing(LlamaRotaryEmbedding):
    """Depends on the length and does not say so."""

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return (cos, sin) if position_ids.max() < 8192 else (sin, cos)


class Reversed(LlamaRotaryEmbedding):
    """A layout of its own."""

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos.flip(-1), sin.flip(-1)


@pytest.mark.parametrize("kind", [Growing, Reversed])
def test_an_embedding_that_the_probe_does_not_reproduce_is_refused(kind):
    with pytest.raises(ValueError, match="not positions times inv_freq"):
        rotary(swapped(kind(llama_config())))


def test_what_is_not_an_embedding_of_positions_is_refused():
    module = nn.Identity()
    module.register_buffer("inv_freq", torch.ones(16))
    with pytest.raises(ValueError, match="does not give cos and sin"):
        rotary(swapped(module))
    with pytest.raises(ValueError, match="no rotary embedding"):
        rotary(swapped(nn.Identity()))
    with pytest.raises(ValueError, match="gpt2 has no rotary"):
        rotary(build("GPT2", {}))


def test_two_embeddings_are_refused_and_twice_the_same_is_one():
    model = copy.deepcopy(tiny_llama())
    model.model.other = LlamaRotaryEmbedding(llama_config())
    assert rotary(model) == rotary(tiny_llama())
    model.model.other.inv_freq *= 0.5
    with pytest.raises(ValueError, match=r"several rotary embeddings.*other"):
        rotary(model)


@pytest.mark.parametrize("change", ["pairs", "arguments"])
def test_another_function_is_refused(monkeypatch, change):
    module = sys.modules["transformers.models.llama.modeling_llama"]
    original = getattr(module, NAME)

    def backwards(q, k, cos, sin, unsqueeze_dim=1):
        return original(q, k, cos, -sin)

    def alone(x, cos, sin):
        return original(x, x, cos, sin)[1]

    monkeypatch.setattr(module, NAME, backwards if change == "pairs" else alone)
    with pytest.raises(
        ValueError, match="pairs neither" if change == "pairs" else r"no function apply_rotary_pos_emb\("
    ):
        rotary(tiny_llama())


def test_check_names_the_layer_that_differs():
    model = tiny_llama()
    found = rotary(model)
    for wrong in (
        found.model_copy(update={"style": "interleaved"}),
        found.model_copy(update={"scaling": 1.1}),
        found.model_copy(update={"frequencies": found.frequencies[::-1]}),
        found.model_copy(update={"frequencies": found.frequencies[:-1]}),
        Unrotate(frequencies=found.frequencies * 2),
    ):
        with pytest.raises(ValueError, match=r"layer 0.*not this layer's"):
            check(model, wrong)


def test_layers_without_rotation_are_seen_by_the_check():
    model = build("SmolLM3", {"no_rope_layers": [1, 0]})
    with pytest.raises(ValueError, match=r"layer 1.*unrotated"):
        check(model, rotary(model))


@pytest.mark.parametrize("test", [self_test, lambda model: check(model, rotary(model))], ids=["tag", "data"])
def test_a_model_that_changes_keys_after_rotation_is_refused(test, monkeypatch):
    model = tiny_llama()
    update, calls = rope._Spy.update, []

    def drifting(self, key_states, *args, **kwargs):
        out = key_states + 1
        out._kvist_pre_rope = pre_rope(key_states)
        calls.append(None)
        return update(self, out, *args, **kwargs)

    monkeypatch.setattr(rope._Spy, "update", drifting)
    with pytest.raises(ValueError, match=r"layer 0.*after RoPE"):
        test(model)
    assert len(calls) == 2


@pytest.mark.parametrize("family", TAGGED)
def test_every_served_layer_carries_its_key_exactly(family):
    self_test(tiny(family, "sdpa"))


@pytest.mark.parametrize("name", SLICED)
def test_families_that_lose_the_tag_say_so(name):
    with pytest.raises(ValueError, match="without the tag"):
        self_test(build(name, {}))


def test_leaving_puts_the_rotary_function_back():
    model = tiny_llama()
    module = sys.modules[type(model).__module__]
    original = getattr(module, NAME)
    with pytest.raises(RuntimeError), tagged(model):
        assert getattr(module, NAME) is not original
        raise RuntimeError
    assert getattr(module, NAME) is original
    assert pre_rope(torch.zeros(1)) is None


def test_probing_and_checking_leave_the_model_as_it_was():
    model = LlamaForCausalLM(llama_config()).train()
    model.model.layers[1].eval()
    original = getattr(sys.modules[type(model).__module__], NAME)
    modes = [part.training for part in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    check(model, rotary(model))
    self_test(model)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert getattr(sys.modules[type(model).__module__], NAME) is original
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
