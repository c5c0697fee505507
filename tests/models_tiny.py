"""Tiny random models from configs, and batches of tokens for them. Nothing is downloaded."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 101
PAD = 0


def llama_config(layers: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 32, **options) -> LlamaConfig:
    """A Llama of a few thousand weights."""
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": dim,
            "max_position_embeddings": 8192,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        }
        | options
    )


def sharpen(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights drawn anew, large enough that logits are not flat and attention looks at some tokens more than others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            gain = 4.0 if "lm_head" in name else 1.7 if "q_proj" in name or "k_proj" in name else 1.0
            fan_in = 1 if "embed" in name else weight.shape[-1]
            weight.copy_(torch.randn(weight.shape, generator=generator) * gain * fan_in**-0.5)
    return model.eval()


@cache
def tiny_llama(attention: str = "sdpa", layers: int = 2, dim: int = 32, kv_heads: int = 2) -> LlamaForCausalLM:
    """A random fp32 Llama with 4 query heads, the same weights at every call; do not change it."""
    model = LlamaForCausalLM._from_config(
        llama_config(layers, dim=dim, kv_heads=kv_heads), attn_implementation=attention, dtype=torch.float32
    )
    return sharpen(model)


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random tokens (B, T), none of them the padding token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: Sequence[int], seed: int = 1) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of rows of unequal lengths, padding on the left."""
    width = max(lengths)
    ids = tokens(len(lengths), width, seed)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths])
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def unpadded(batch: int, length: int, seed: int = 1) -> dict[str, Tensor]:
    """`input_ids` and an `attention_mask` of ones."""
    ids = tokens(batch, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
