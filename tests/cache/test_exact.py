"""`exact` is transformers' own cache, to the bit."""

import pytest
import torch
from models_tiny import padded, tiny_llama, tokens, unpadded
from transformers import DynamicCache

import kvist
from kvist.models.compat import cache_argument

INPUTS = {"unpadded": unpadded(2, 150), "one row": unpadded(1, 90), "left-padded": padded([150, 97, 12])}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 50}], ids=str)
@pytest.mark.parametrize("which", INPUTS)
def test_generate_is_bit_identical(which, options, attention):
    model, said = tiny_llama(attention), []
    for cache in (DynamicCache(config=model.config), kvist.Cache(model, "exact")):
        torch.manual_seed(3)
        settings = {"max_new_tokens": 30, "do_sample": False} | options
        out = model.generate(
            **INPUTS[which], **cache_argument(cache), output_logits=True, return_dict_in_generate=True, **settings
        )
        said.append(out)
    assert torch.equal(said[0].sequences, said[1].sequences)
    for ours, theirs in zip(said[1].logits, said[0].logits, strict=True):
        assert torch.equal(ours, theirs)


def test_attached_is_bit_identical_too():
    """With nothing packed the model's own attention is called on the stored tensors."""
    model, inputs, said = tiny_llama(), INPUTS["left-padded"], []
    for attached in (False, True):
        cache = kvist.Cache(model, "exact") if attached else DynamicCache(config=model.config)
        attachment = kvist.attach(model) if attached else None
        out = model.generate(
            **inputs,
            **cache_argument(cache),
            max_new_tokens=20,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        if attachment:
            attachment.close()
        said.append(torch.stack(out.logits))
    assert torch.equal(*said)


def test_crop_and_reorder_are_bit_identical():
    model, inputs, said = tiny_llama(), unpadded(3, 100), []
    for cache in (DynamicCache(config=model.config), kvist.Cache(model, "exact")):
        logits, mask = [], torch.ones(3, 200, dtype=torch.long)
        with torch.no_grad():
            model(**inputs, **cache_argument(cache))
            for depth in (3, 40):
                cache.crop(-depth)
                cache.reorder_cache(torch.tensor([1, 2, 0]))
                stop = cache.get_seq_length() + 5
                logits.append(model(tokens(3, 5, depth), attention_mask=mask[:, :stop], **cache_argument(cache)).logits)
        said.append(torch.cat(logits, 1))
    assert torch.equal(*said)
