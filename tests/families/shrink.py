"""A tiny model of every decoder family that the installed transformers has, from its default config made small.

Sizes are shrunk by what their names say; of the layers, one of each kind is kept. Nothing is downloaded.
"""

import re
import warnings
from functools import cache
from typing import Any

import torch
from models_tiny import PAD, VOCABULARY, sharpen
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LAYERS = 4
FIXED = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True}
IGNORED = ("model_type", "transformers_version", "architectures", "dtype", "id2label", "label2id", "num_labels")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
WINDOW = 24  # shorter than the prompts of the tests
LEAST = 64  # a size that no rule knows is not made smaller than this

# what a number becomes, by the first of these that its name matches
RULES: tuple[tuple[str, int], ...] = (
    (r"vocab.*size(?!.*base)|vocab_size", VOCABULARY),
    (r"(window|attention_chunk_size|local_attention)(_size)?$", WINDOW),
    (r"topk_group$|n_groups?$|_ngroups$|n_group$|expert_group$|num_query_groups$", 1),
    (r"(top_?k|per_tok(en)?|moe_k|moe_topk)$", 2),
    (r"shared_experts?$", 1),
    (r"experts$|expert_num$", 4),
    (r"(period|interval|every_n_layers|layer_group_size|sparse_step|sliding_window_pattern)$", 2),
    (r"(offset)$", 1),
    (r"qk_nope_head_dim$|v_head_dim$", 16),
    (r"rope_head_dim$|rotary_dim$", 8),
    (r"qk_head_dim$", 24),
    (r"(head_dim|head_size|d_head|kv_channels|dim_head|headdim|state_size|d_state)$", 16),
    (r"(kv_heads|key_value_heads|kv_n_heads|key_heads|multi_query_group_num)$", 2),
    (r"heads$|n_head$", 4),
    (r"lora_rank$|dt_rank$|rank$|time_step_rank$", 16),
    (r"num_hidden_layers$|n_layers?$|num_layers$|decoder_layers$|encoder_layers$|max_window_layers$", LAYERS),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|embd_dim|emb_dim|embedding_size|proj_dim|lru_width|dim_model|embedding_dim)$",
        64,
    ),
    (r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|model_max_length|max_target_positions)$", 4096),
    (r"(intermediate_size|ffn_dim|ffn_size|_ff|dff|d_inner|ffn_hidden_size)", 96),
)
LEFT = re.compile(
    r"token_id|_index$|_index_|position_embeddings$|seed|(?<!attention_)chunk_size|conv_|kernel|scal|floor|original_max|label"
)

# what the defaults do not show, or the rules get wrong
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dory": {"layer_types": ["sliding_attention", "full_attention"] * 2, "n_input_layers": 1, "n_recurrent_layers": 2,
             "n_output_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "mllama": {"cross_attention_layers": [1, 3]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
              "num_hidden_layers": 5, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"mamba_headdim": 32, "n_mamba_heads": 4, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def number(name: str, value: int) -> int:
    """What a config's number of this name becomes."""
    if LEFT.search(name) and "vocab" not in name:
        return value
    for pattern, small in RULES:
        if re.search(pattern, name):
            return small
    return min(value, LEAST)


def chosen(types: list, count: int) -> list[int]:
    """Numbers of the layers that are kept: the first of each kind, the last, and others from the front."""
    first = {kind: types.index(kind) for kind in dict.fromkeys(types)}
    kept = {*first.values(), len(types) - 1}
    kept |= set([i for i in range(len(types)) if i not in kept][: max(0, count - len(kept))])
    return sorted(kept)


def shrunk(config) -> dict[str, Any]:
    """Keywords that make a config like this one small."""
    known = {k: v for k, v in config.to_dict().items() if not (k.startswith("_") or k in IGNORED)}
    deep = next((known[name] for name in DEPTHS if isinstance(known.get(name), int)), 0)
    types = known.get("layer_types") or known.get("layers_block_type")
    kept = chosen(types if types and len(types) == deep else [""] * deep, LAYERS)
    made: dict[str, Any] = {}
    for name, value in known.items():
        if name in getattr(config, "sub_configs", {}) and value is not None:
            made[name] = shrunk(getattr(config, name))
        elif name == "per_layer_config" and value:
            own = {int(layer): facts for layer, facts in value.items()}
            made[name] = {
                j: {k: 2 * number(k, v) if v > 2 else v for k, v in own[i].items()}
                for j, i in enumerate(kept)
                if i in own
            }
        elif isinstance(value, list) and deep and len(value) == deep:
            made[name] = list(range(len(kept))) if value == list(range(deep)) else [value[i] for i in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            made[name] = len(kept) if name in DEPTHS else number(name, value)
    made |= {name: fixed for name, fixed in FIXED.items() if name in known}
    made = {name: value for name, value in made.items() if value != known[name]}
    if known.get("head_dim") is not None and known.get("head_dim") == known.get("qk_rope_head_dim"):
        made["head_dim"] = made["qk_rope_head_dim"]
    if known.get("kv_lora_rank"):  # compressed latents have a head for each query
        made["num_key_value_heads"] = made["num_attention_heads"]
    return made


def built(family: str):
    """The small config of a family, and the class of its model."""
    config = CONFIG_MAPPING[family]()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        config = config.get_text_config(decoder=True)
    return type(config)(**(shrunk(config) | CHANGES.get(family, {}))), kind


@cache
def tiny(family: str):
    """A random model of a family, the same weights at every call; do not change it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, kind = built(family)
        torch.manual_seed(0)
        try:
            model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        except ValueError:
            model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return sharpen(model)
