"""Models of well-known shapes with random weights: speed and memory do not depend on what the weights say."""

import difflib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192}
MISTRAL = {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None}
QWEN_3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
TIED = {"tie_word_embeddings": True}
# hidden size, feed-forward size, layers, query heads, KV heads, base of the rotary embedding, what a family shares
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 1e4, LLAMA_2),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 1e4, LLAMA_2),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 5e5, LLAMA_3),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 5e5, LLAMA_3),
    "mistral-7b": (4096, 14336, 32, 32, 8, 1e6, MISTRAL),  # version 0.3: no sliding window
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 1e6, QWEN_3 | TIED),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 1e6, QWEN_3 | TIED),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 1e6, QWEN_3),
}
SPREAD = 0.02


def shape(name: str, layers: int = 0) -> PreTrainedConfig:
    """The config behind a name, cut to `layers` layers if that is not 0. Raises ValueError for an unknown name, with
    the nearest, and for more layers than the model has."""
    if name not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"no shape is called {name!r}{hint} there are {', '.join(SHAPES)}")
    hidden, inner, depth, heads, kv_heads, base, family = SHAPES[name]
    if layers > depth:
        raise ValueError(f"{name} has {depth} layers, found --layers {layers}; give {depth} or fewer")
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_key_value_heads": kv_heads}
    return AutoConfig.for_model(
        **{"tie_word_embeddings": False, **family, **sizes},
        num_attention_heads=heads,
        num_hidden_layers=layers or depth,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def outline(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def nbytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights; those that are shared count once."""
    return sum(weight.nbytes for weight in model.parameters())


def random_weights(
    config: PreTrainedConfig, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model of small normal weights, drawn in place in `dtype`; its logits are finite."""
    model = outline(config, dtype).to_empty(device=device)
    model.tie_weights()
    inner = model.get_decoder()
    inner.rotary_emb = type(inner.rotary_emb)(config).to(device)  # its frequencies are buffers, not weights
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() < 2:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, SPREAD, generator=generator)
    return model.eval()
