"""The reference models: small, alike but for what is known to turn the order of cache methods round."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

MOST = 7_000_000  # parameters
HIDDEN, LAYERS, WIDE = 256, 6, 704
ARCHITECTURES = {"plain": "llama", "bias": "qwen2", "norm": "qwen3"}


def _variant(kind: str, ratio: int, head_dim: int, context: int = 2048) -> dict[str, Any]:
    """4 query heads, and a KV head for each `ratio` of them. Qwen2 has biases on queries, keys and values; Qwen3 has
    norms on queries and keys."""
    return {
        "model_type": ARCHITECTURES[kind],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 // ratio,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "plain-1to1-64": _variant("plain", 1, 64),
    "plain-4to1-64": _variant("plain", 4, 64),
    "plain-4to1-128": _variant("plain", 4, 128),
    "bias-1to1-64": _variant("bias", 1, 64),
    "bias-4to1-128": _variant("bias", 4, 128),
    "norm-1to1-64": _variant("norm", 1, 64),
    "norm-4to1-128": _variant("norm", 4, 128),
    "plain-4to1-128-8k": _variant("plain", 4, 128, context=8192),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The variants of these names, all of them for "all". ValueError for another name."""
    for name in names:
        if name != "all" and name not in VARIANTS:
            raise ValueError(f"a reference model is one of {', '.join(VARIANTS)}, or all; found {name!r}")
    return list(VARIANTS) if "all" in names else list(dict.fromkeys(names))


def config_of(variant: dict[str, Any], tokenizer) -> PreTrainedConfig:
    """The configuration of a variant with the vocabulary of a tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    fields = {name: value for name, value in variant.items() if name != "model_type"}
    return AutoConfig.for_model(variant["model_type"], vocab_size=len(tokenizer), **fields, **special)


def build(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A model with random weights in fp32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def parameters(model: nn.Module) -> int:
    """How many there are; tied ones count once."""
    return sum(weight.numel() for weight in model.parameters())


def start_from(model: nn.Module, folder: str | Path) -> list[str]:
    """Copy every tensor outside attention whose name and shape agree with the model in `folder`; their names.
    ValueError where there is no model, or none agrees."""
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"expected a model's folder with a model.safetensors in it, found none at {folder}")
    copied = []
    with safe_open(file, "pt") as given, torch.no_grad():
        names = set(given.keys())
        for name, weight in model.named_parameters():
            # queries and keys of another model fit no other values: attention is learned anew
            if "self_attn" in name or name not in names or given.get_slice(name).get_shape() != list(weight.shape):
                continue
            weight.copy_(given.get_tensor(name))
            copied.append(name)
    if not copied:
        raise ValueError(f"no tensor of {folder} has a name and a shape of this variant; leave --start out")
    return copied


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """The model in bf16 with its configuration and tokenizer, each file whole or not at all."""
    logging.disable_progress_bar()
    scratch = folder / "part"
    model.to(torch.bfloat16).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    for file in sorted(scratch.iterdir()):
        file.replace(folder / file.name)
    scratch.rmdir()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that may not be there yet: empty then."""
    return json.loads(path.read_text()) if path.is_file() else {}
