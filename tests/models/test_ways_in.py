"""Whichever module is called, and by whichever wrapper, the cache sees which slots are tokens, or refuses."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from models_tiny import VOCABULARY, llama_config, padded, sharpen, tokens
from torch import Tensor, distributed, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaForCausalLM

import kvist
from kvist.models.compat import CACHE_NAMES, cache_argument

LENGTHS = (40, 23)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return sharpen(LlamaForCausalLM._from_config(llama_config(), dtype=torch.float32))


class Wrapper(nn.Module):
    """Knows of no cache: hands on what it is given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def compiled_forward(model, tmp_path):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def lora(model, tmp_path):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).eval()


def parallel(model, tmp_path):
    if not distributed.is_initialized():
        store = distributed.FileStore(str(tmp_path / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    return nn.parallel.DistributedDataParallel(model)


def in_memory(model, tmp_path):
    return pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def on_disk(model, tmp_path):
    return pytest.importorskip("accelerate").disk_offload(model, str(tmp_path), torch.device("cpu"))


DOORS: dict[str, Callable] = {
    "itself": lambda model, _: model,
    "text model": lambda model, _: model.model,
    "wrapper": lambda model, _: Wrapper(Wrapper(model)),
    "compiled wrapper": lambda model, _: torch.compile(model, backend="eager"),
    "compiled forward": compiled_forward,
    "peft": lora,
    "ddp": parallel,
    "offloaded to memory": in_memory,
    "offloaded to disk": on_disk,
}


@pytest.fixture(params=DOORS)
def door(request, model, tmp_path):
    yield DOORS[request.param](model, tmp_path)
    torch.compiler.reset()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def said(called, cache, batch: dict[str, Tensor]) -> Tensor:
    """What comes out for the last token of each row."""
    with torch.no_grad():
        out = called(**batch, **cache_argument(cache))
    return (out.logits if "logits" in out else out.last_hidden_state)[:, -1]


WRAPPERS_OWN = [f"ignore::{kind}Warning" for kind in ("Deprecation", "Future", "User")]


@pytest.mark.filterwarnings(*WRAPPERS_OWN)
@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 2)], ids=["batch", "padded row"])
def test_padding_is_never_stored_as_tokens(model, door, rows):
    batch, lengths = {name: x[rows] for name, x in padded(LENGTHS).items()}, LENGTHS[rows]
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    for made_for in (model, door) if hasattr(door, "config") else (model,):
        cache = kvist.Cache(made_for, "int8")
        found = said(door, cache, batch | {"position_ids": positions})
        assert [cache.inner.rows.tokens(row, 40) for row in range(len(lengths))] == list(lengths)
        for row, length in enumerate(lengths):
            row_alone = {"input_ids": batch["input_ids"][row : row + 1, -length:]}
            alone = said(door, kvist.Cache(made_for, "int8"), row_alone)
            torch.testing.assert_close(found[row], alone[0], rtol=0, atol=1e-4 * float(alone.std()))


def test_a_wrapper_without_a_config_is_refused_by_name(model):
    with pytest.raises(ValueError, match="expected a transformers model, found Wrapper"):
        kvist.Cache(Wrapper(model), "int8")


def test_a_layer_called_by_hand_is_refused(model):
    """Its mask is four-dimensional, or none; nobody said which slots are padding."""
    cache, hidden = kvist.Cache(model, "int8"), torch.randn(1, 9, 64)
    turned = model.model.rotary_emb(hidden, torch.arange(9).unsqueeze(0))
    call = {"position_embeddings": turned, **cache_argument(cache)}
    with torch.no_grad(), pytest.raises(ValueError, match="arrived from LlamaAttention without its attention mask"):
        model.model.layers[0](hidden, **call)
    cache.announce(1, 9, None)
    with torch.no_grad():
        model.model.layers[0](hidden, **call)
    assert cache.inner.ours[0].slots == 9


def test_what_a_failed_call_announced_is_forgotten(model):
    cache, batch = kvist.Cache(model, "int8"), padded(LENGTHS)
    with torch.no_grad(), pytest.raises(IndexError):
        model(batch["input_ids"] + 1000, attention_mask=batch["attention_mask"], **cache_argument(cache))
    assert cache.inner.rows.slots == 0
    other = LlamaForCausalLM(llama_config())
    with torch.no_grad(), pytest.raises(ValueError, match="without its attention mask"):
        other(**batch, **cache_argument(cache))
    said(model.model, cache, batch)
    assert [cache.inner.rows.tokens(row, 40) for row in range(2)] == list(LENGTHS)


class Prompted(nn.Module):
    """Puts two slots of its own before every prompt, as prompt tuning does, for better or worse."""

    def __init__(self, model, says: bool):
        super().__init__()
        self.inner, self.says, self.config = model, says, model.config

    def forward(self, input_ids, attention_mask=None, cache=None, past_key_values=None):
        more = torch.nn.functional.pad(input_ids, (2, 0), value=7)
        mask = torch.nn.functional.pad(attention_mask, (2, 0), value=1) if self.says else None
        return self.inner.model(more, attention_mask=mask, **cache_argument(cache or past_key_values))


def test_tokens_that_a_wrapper_adds_are_heard_if_it_says_their_mask(model):
    batch, silent = padded(LENGTHS), Prompted(model, False)
    wrapper = Prompted(model, True)
    cache = kvist.Cache(wrapper, "int8")
    said(wrapper, cache, batch)
    assert [cache.inner.rows.tokens(row, 42) for row in range(2)] == [length + 2 for length in LENGTHS]
    plain = kvist.Cache(wrapper, "int8")
    said(wrapper, plain, {"input_ids": tokens(1, 9), "attention_mask": torch.ones(1, 9)})
    said(wrapper.inner, plain, {"input_ids": tokens(1, 1), "attention_mask": torch.ones(1, 12)})
    assert plain.inner.rows.dense(12)
    with pytest.raises(ValueError, match="2 x 42 tokens inside a call with 2 x 40"):
        said(silent, kvist.Cache(silent, "int8"), batch)


def test_the_mask_of_a_vision_model_stands_for_the_text_model_it_calls():
    """It makes four-dimensional masks itself, which say nothing of padding to the text model inside."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    vision = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=sizes | text, vision_config=sizes | vision, mm_tokens_per_image=1)
    model = sharpen(Gemma3ForConditionalGeneration._from_config(config, dtype=torch.float32))
    batch = padded(LENGTHS)
    for called in (model, model.model, model.model.language_model):
        cache = kvist.Cache(model, "int8")
        said(called, cache, batch)
        assert [cache.inner.rows.tokens(row, 40) for row in range(2)] == list(LENGTHS)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_found_under_any_name(model, name):
    """The hook looks for the cache itself, not for its keyword."""
    cache, (hook,) = kvist.Cache(model, "int8"), model._forward_pre_hooks.values()
    hook(model, (), padded(LENGTHS) | {name: cache})
    assert cache.inner.rows.slots == 40
    hook(model, (tokens(1, 5),), {name: object()})
    assert cache.inner.rows.slots == 40
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        hook(model, (), {name: cache})
