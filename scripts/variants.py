"""The reference models: small, alike but for what is known to turn the order of cache methods round."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

MOST = 7_000_000  # parameters
HIDDEN, LAYERS, WIDE = 256, 6, 704
NOISE = 0.5  # of the spread of attention that was regrouped
QUIET = 0.25  # of the spread: attention that knows nothing yet disturbs the copied layers little
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
    """Copy the model in `folder` as far as it fits: every tensor outside attention whose name and shape agree, and
    attention where its heads can be regrouped. The names of what was copied. Other attention is drawn anew, as wide as
    the copied layers are used to. ValueError where there is no model, or nothing outside attention agrees."""
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"expected a model's folder with a model.safetensors in it, found none at {folder}")
    given = {name: tensor.float() for name, tensor in load_file(file).items()}
    own = dict(model.named_parameters())
    same = [name for name, weight in own.items() if "self_attn" not in name and _shape(given, name) == weight.shape]
    if not same:
        raise ValueError(f"no tensor of {folder} has a name and a shape of this variant; leave --start out")
    with torch.no_grad():
        for name in same:
            own[name].copy_(given[name])
        regrouped = _regroup(own, given, AutoConfig.from_pretrained(folder), model.config)
        for name, weight in own.items():
            if "self_attn" in name and name in given and name not in regrouped:
                weight.normal_(std=given[name].std().item() * (QUIET if "o_proj" in name else 1.0))
    return same + regrouped


def _shape(given: dict[str, Tensor], name: str) -> torch.Size | None:
    return given[name].shape if name in given else None


def _regroup(own: dict[str, nn.Parameter], given: dict[str, Tensor], old: Any, new: Any) -> list[str]:
    """Attention for other KV heads: each repeated, or as many folded into one as it is wider. Some noise lets repeated
    heads part ways. The names of what was written: none where the heads fit in neither way."""
    heads, groups, dim = old.num_attention_heads, old.num_key_value_heads, old.head_dim
    fold, repeat = groups // new.num_key_value_heads, new.num_key_value_heads // groups
    wide = new.head_dim
    if (
        new.num_attention_heads != heads
        or wide != dim * max(fold, 1)
        or max(fold, 1) * new.num_key_value_heads % groups
    ):
        return []
    # folded heads take turns at the channels' pairs, which keeps their rotary frequencies or nearly so
    half = torch.arange(dim // 2) * max(fold, 1)
    turned = torch.cat([half, half + wide // 2])
    written = []
    for layer in range(new.num_hidden_layers):
        part = f"model.layers.{layer}.self_attn."
        q, k, v, o = (given[f"{part}{side}_proj.weight"] for side in "qkvo")
        if repeat:
            k, v = (x.unflatten(0, (groups, dim)).repeat_interleave(repeat, 0).flatten(0, 1) for x in (k, v))
        else:
            q_, k_, v_, o_ = (torch.zeros_like(own[f"{part}{side}_proj.weight"]) for side in "qkvo")
            for group in range(groups):
                base, slot = group // fold * wide, group % fold
                k_[base + turned + slot] = k[group * dim : (group + 1) * dim]
                v_[base + slot * dim :][:dim] = v[group * dim : (group + 1) * dim]
            for head in range(heads):
                slot, rows = head * groups // heads % fold, slice(head * dim, (head + 1) * dim)
                q_[head * wide + turned + slot] = q[rows] * fold**0.5
                o_[:, head * wide + slot * dim :][:, :dim] = o[:, rows]
            q, k, v, o = q_, k_, v_, o_
        scale = given[f"model.layers.{layer}.input_layernorm.weight"]
        for side, x in zip("qkvo", (q, k, v, o), strict=True):
            own[f"{part}{side}_proj.weight"].copy_(x + NOISE * x.std() * torch.randn_like(x))
            written.append(f"{part}{side}_proj.weight")
            if f"{part}{side}_norm.weight" in own:  # the size that queries and keys had without it
                own[f"{part}{side}_norm.weight"].fill_((x * scale).square().sum(1).mean().sqrt())
    return written


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
