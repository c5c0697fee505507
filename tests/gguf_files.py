"""Small GGUF files of random models: written by the library that reads them, weights as llama.cpp lays them out."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from models_tiny import VOCABULARY
from torch import Tensor
from transformers import LlamaForCausalLM

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def write(path: Path, model: LlamaForCausalLM, quantized: bool = False, leave_out: str = "", **lies: int) -> Path:
    """`model` as a GGUF file, matrices in Q8_0 if `quantized`. `leave_out`: a tensor that is not written; `lies`: sizes
    that the metadata states instead of the true ones."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
    } | lies
    for name, size in sizes.items():
        writer.add_uint32(f"llama.{name}", size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _tokenizer(writer)
    for name, weight in model.state_dict().items():
        called = _called(name)
        if called == leave_out:
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        side = next((n for part, n in heads.items() if f".{part}." in called), None)
        array = (weight if side is None else _interleaved(weight, side)).float().numpy()
        if quantized and array.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(called, quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(called, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _called(name: str) -> str:
    """llama.cpp's name of a weight."""
    for ours, theirs in NAMES.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name.replace("model.layers.", "blk.")


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, for a rotary embedding that pairs neighbours instead of halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _tokenizer(writer: GGUFWriter) -> None:
    """Byte-level BPE without merges worth the name; token 2 ends a text."""
    special = ["<pad>", "<s>", "</s>"]
    letters = [chr(code) for code in range(33, 33 + VOCABULARY - len(special) - 3)]
    words = [*special, *letters, "Ġ", "th", "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(special) + [1] * (len(words) - len(special)))
    writer.add_token_merges(["t h", "h e"])  # transformers 5.17 takes a list of one for its text
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
