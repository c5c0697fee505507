"""Every decoder family of the installed transformers × what is done to a cache × exact and int8. A few of each kind of
layer by default; all of them with `--families all`, which prints the table of what is equal and what is refused.
"""

import pytest
import torch
import transformers
from models_tiny import tokens
from shrink import FAMILIES, tiny
from sweep import METHODS, OPERATIONS, said, verdict
from transformers import DynamicCache

import kvist
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument

# one of each kind of layers, and of each reason to refuse
SAMPLE = (
    "bert", "gemma3n_text", "gemma4_text", "gpt_bigcode", "granitemoehybrid", "lfm2", "mimo_v2_flash", "mllama",
    "nemotron_h", "openai-gpt", "qwen3_next",
)  # fmt: skip
REFUSED = {  # older releases of transformers give the states of some no name of a cache
    "blt": "does not tell its layers", "deepseek_v3": "compressed latents", "dory": "several times over a text",
    "falcon_h1": "its attention grows", "falcon_mamba": "does not grow with the context|takes no cache",
    "minimax": "a cache class of",
    "moshi": "its window bounds its cache", "openai-gpt": "takes no cache", "rwkv": "takes no cache",
    "xlm": "fails behind a prompt", "xlstm": "without attention heads|takes no cache",
}  # fmt: skip
CANNOT = {  # what layers that drop what they held must refuse
    "gemma4_text": "its window of 24 tokens has dropped", "granitemoehybrid": "its state is a sum over all tokens",
    "lfm2": "no more tokens than its convolution", "nemotron_h": "its state is a sum over all tokens",
    "qwen3_next": "its state is a sum over all tokens", "mimo_v2_flash": "its window of 24 tokens has dropped",
    "gemma3n_text": "its window of 24 tokens has dropped",
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "swept" in metafunc.fixturenames:
        every = metafunc.config.getoption("--families") == "all"
        metafunc.parametrize("swept", FAMILIES if every else [family for family in SAMPLE if family in FAMILIES])


@pytest.mark.filterwarnings("ignore")
def test_what_is_done_to_a_cache(swept, tmp_path, record_property):
    try:
        model = tiny(swept)
    except Exception as error:  # a config that cannot be shrunk by its fields' names alone, or a package not here
        assert swept not in SAMPLE
        pytest.skip(f"{swept} is not built: {' '.join(str(error).split())[:160]}")
    found = {(o, m): verdict(model, o, m, tmp_path) for o in (*OPERATIONS, "eval") for m in METHODS}
    record_property("row", row(swept, found))
    assert all(found.values())
    for (operation, method), sentence in found.items():
        if swept in CANNOT and operation in ("mend", "crop"):
            assert (CANNOT[swept] if operation == "crop" else "cannot go back") in sentence
        elif swept in SAMPLE and swept not in REFUSED:
            assert sentence == ("equal" if method == "exact" else "within"), f"{operation} {method}: {sentence}"


def row(family: str, found: dict) -> str:
    """A line of the table: operations whose verdict is the same stand together."""
    groups: dict[str, list[str]] = {}
    for (operation, method), sentence in found.items():
        groups.setdefault(sentence, []).append(f"{operation} {method}")
    if len(groups) == 1:
        return f"| {family} | all: {next(iter(groups))} |"
    return f"| {family} | " + "; ".join(f"{', '.join(those)}: {sentence}" for sentence, those in groups.items()) + " |"


@pytest.mark.parametrize("family", [family for family in REFUSED if family in FAMILIES])
@pytest.mark.filterwarnings("ignore")
def test_a_family_that_is_refused_is_told_the_true_reason(family):
    with pytest.raises(ValueError, match=REFUSED[family]) as caught:
        kvist.Cache(tiny(family), "int8")
    assert str(caught.value).startswith(family)


@pytest.mark.parametrize("family", ["gemma4_text", "mimo_v2_flash", "gpt_bigcode", "nemotron_h", "mllama", "dots1"])
@pytest.mark.filterwarnings("ignore")
def test_shapes_of_layers_are_those_that_are_stored_and_billed(family):
    model = tiny(family)
    cache = kvist.Cache(model, "int8", reserve=200)
    said(model, cache, tokens(1, 100))
    shapes = describe(model).shapes
    assert tuple(layer.shape for layer in cache.inner.ours) == shapes
    bill = cache.recipe.bill(shapes, len(shapes), 100, reserve=200)
    assert bill.total() == cache.report().nbytes - cache.report().allocated.get("other", 0)


def test_a_picture_s_keys_stay_with_transformers():
    """Cross-attention layers: as many keys as the picture has patches, saved and repeated with the rest, never cut."""
    text = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3], "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(**text, **heads, **ends)
    model = transformers.MllamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    picture, logits = torch.randn(1, 17, 64, generator=torch.Generator().manual_seed(0)), []
    mask = torch.ones(1, 1, 60, 17)
    for cache in (kvist.Cache(model, "exact"), DynamicCache(config=config)):
        given = {"cross_attention_states": picture, "cross_attention_mask": torch.zeros(1, 1, 60, 17)}
        given["full_text_row_masked_out_mask"] = mask.amax(-1, keepdim=True)
        with torch.no_grad():
            model(tokens(1, 60), **given, **cache_argument(cache))
            if isinstance(cache, kvist.Cache):
                cache.crop(-3)
            else:
                for layer in (cache.layers[0], cache.layers[2]):
                    layer.crop(-3)
            logits.append(model(tokens(1, 1, 5), **cache_argument(cache)).logits)
    assert torch.equal(*logits)
