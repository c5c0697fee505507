"""A tiny random model of every family, from its config. Nothing is downloaded."""

from functools import cache

import torch
import transformers
from models_tiny import PAD, VOCABULARY, sharpen

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 48  # of sliding layers: shorter than the prompts of the tests
MIXED = ["sliding_attention", "full_attention"]


def _rope(kind: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
DBRX = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 4096,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
FALCON = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"} | {"alibi": False, "parallel_attn": True}

# family: (config class, what differs from COMMON, the attentions it runs with)
BOTH = ("sdpa", "eager")
FAMILIES: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "llama": ("Llama", {}, BOTH),
    "llama3-rope": ("Llama", LLAMA3, ("sdpa",)),
    "llama-yarn": ("Llama", YARN, ("sdpa",)),
    "llama-linear": ("Llama", _rope("linear", factor=2.0), ("sdpa",)),
    "llama-head40": ("Llama", {"head_dim": 40}, ("sdpa",)),
    "llama-head64": ("Llama", {"head_dim": 64}, ("sdpa",)),
    "llama-head80": ("Llama", {"head_dim": 80}, ("sdpa",)),
    "llama-head96": ("Llama", {"head_dim": 96}, ("sdpa",)),
    "mistral": ("Mistral", {"sliding_window": None}, ("sdpa",)),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}, ("sdpa",)),
    "qwen2": ("Qwen2", {}, ("sdpa",)),
    "qwen3": ("Qwen3", {"head_dim": 32}, ("sdpa",)),
    "phi3": ("Phi3", {"hidden_size": 128, **_rope("default", partial_rotary_factor=0.5)}, ("sdpa",)),
    "falcon-multi-query": ("Falcon", FALCON | {"multi_query": True, "new_decoder_architecture": False}, BOTH),
    "falcon-many-heads": ("Falcon", FALCON | {"multi_query": False, "new_decoder_architecture": False}, ("sdpa",)),
    "falcon-new": ("Falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}, ("sdpa",)),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED}, ("eager",)),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED}, BOTH),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        ("eager",),
    ),
    "dbrx": ("Dbrx", DBRX, ("sdpa",)),
    "starcoder2": ("Starcoder2", {"sliding_window": None}, ("sdpa",)),
    "cohere": ("Cohere", {}, ("sdpa",)),
    "olmo2": ("Olmo2", {}, ("sdpa",)),
    "granite": ("Granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.9}, ("sdpa",)),
}
CASES = [(family, attention) for family, (_, _, kinds) in FAMILIES.items() for attention in kinds]
MODEL = {"Gemma3Text": "Gemma3ForCausalLM"}


@cache
def tiny(family: str, attention: str, dtype: torch.dtype = torch.float32):
    """A random model of a family, the same weights at every call; do not change it."""
    name, changes, _ = FAMILIES[family]
    options = changes if name in ("Dbrx", "Falcon") else COMMON | changes
    config = getattr(transformers, f"{name}Config")(**options)
    kind = getattr(transformers, MODEL.get(name, f"{name}ForCausalLM"))
    torch.manual_seed(0)
    model = sharpen(kind._from_config(config, attn_implementation=attention, dtype=torch.float32))
    with torch.no_grad():  # biases, attention sinks and gains that are not all alike
        for i, weight in enumerate(w for w in model.parameters() if w.dim() < 2):
            generator = torch.Generator().manual_seed(i)
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.to(dtype).eval()
