"""Planted sinks and outliers are found where they were planted; what is reported is what the model computes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from models_tiny import llama_config, sharpen, tiny_llama, tokens
from transformers import LlamaForCausalLM

from kvist.models.compat import CACHE_KEYWORD

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from anatomy import BEHIND, anatomy, sentences

FIRST = 5  # a token that stands at the start alone
DIM = 32
SLOW = DIM // 2 - 1  # the channel that the rotary embedding turns least, with its mate


def windows(count: int = 2, length: int = 128):
    """Tokens other than FIRST behind it."""
    ids = tokens(count, length)
    ids[ids == FIRST] = FIRST + 1
    ids[:, 0] = FIRST
    return ids


def model() -> LlamaForCausalLM:
    config = llama_config(attention_bias=True)
    made = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return sharpen(made)


def test_what_is_reported_is_what_the_model_computes():
    ids, eager = windows(), tiny_llama("eager")
    found = anatomy(tiny_llama(), ids)
    with torch.no_grad():
        out = eager(ids, output_attentions=True)
    for layer, weights in enumerate(out.attentions):
        heads = weights[:, :, BEHIND + 1 :, 0].mean((0, 2))
        assert found["sinks"]["mass"][layer] == pytest.approx(heads.mean().item(), abs=1e-4)
        for side, name in enumerate(("keys", "values")):
            x = list(out[CACHE_KEYWORD])[layer][side].transpose(1, 2).flatten(0, 1).flatten(1)
            size = x.abs().mean(0)
            assert found[name]["largest"][layer] == pytest.approx((size.max() / size.median()).item(), rel=1e-3)
            offset = (x.mean(0).abs() / x.std(0, correction=0)).max().item()
            assert found[name]["offset"][layer] == pytest.approx(offset, rel=1e-2)


@torch.no_grad()
def test_a_planted_sink_is_found_in_its_layer_and_heads():
    planted = model()
    before = anatomy(planted, windows())
    attention = planted.model.layers[0].self_attn
    seen = planted.model.embed_tokens.weight[FIRST]
    attention.k_proj.weight[SLOW] = 40 * seen / seen.norm()
    for head in (0, 1):  # the queries of the first KV head
        attention.q_proj.bias[head * DIM + SLOW] = 5.0
    found = anatomy(planted, windows())
    assert before["sinks"]["heads"] == [0.0, 0.0]
    assert found["sinks"]["heads"] == [0.5, 0.0]
    assert 0.45 < found["sinks"]["mass"][0] < 0.6 and found["sinks"]["mass"][1] < 0.1
    assert found["summary"]["sink_heads"] == 0.25


@torch.no_grad()
def test_planted_channels_are_found_on_their_side():
    planted = model()
    before = anatomy(planted, windows())
    layer = planted.model.layers[1].self_attn
    layer.k_proj.weight[[SLOW, SLOW + DIM // 2]] *= 20
    layer.v_proj.bias[3] = 30.0
    found = anatomy(planted, windows())
    assert found["keys"]["largest"][1] > 10 > 2 * before["keys"]["largest"][1]
    assert found["values"]["offset"][1] > 10 > 2 * before["values"]["offset"][1]
    assert found["keys"]["largest"][0] == before["keys"]["largest"][0]
    assert found["summary"]["keys_largest"] == found["keys"]["largest"][1]


def test_it_is_json_and_sentences_and_leaves_the_model_as_it_was():
    measured = model()
    found = anatomy(measured, windows(1))
    assert json.loads(json.dumps(found)) == found
    assert measured.config._attn_implementation == "sdpa"
    assert len(found["keys"]["largest"]) == 2
    told = sentences(found)
    assert len(told) == 3 and "%" in told[0] and told[1].startswith("keys")


def test_windows_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="65 tokens"):
        anatomy(model(), tokens(1, BEHIND + 1))
