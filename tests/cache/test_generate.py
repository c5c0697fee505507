"""Every method under every way that `generate` can be used, against the oracle."""

import pytest
import torch
from models_tiny import padded, tiny_llama, unpadded
from oracle import OracleCache
from shadow import ROUGH, Shadow, agree, compare, generating

import kvist
from kvist.testing.cases import CASES, EACH, recipe

NEW = 40
WAYS = ("attached", "sdpa")
NUMERICAL = [pytest.param(text, marks=pytest.mark.numerical if text in EACH else ()) for text in CASES]


@pytest.mark.parametrize("text", NUMERICAL)
def test_greedy(text):
    compare(generating(unpadded(1, 190), NEW), recipe(text), *WAYS)


@pytest.mark.parametrize("text", EACH)
def test_greedy_with_eager_attention(text):
    compare(generating(unpadded(1, 190), NEW), recipe(text), "eager")


@pytest.mark.parametrize("text", CASES)
def test_left_padded_rows_of_unequal_lengths(text):
    inputs = padded([170, 131, 20])
    compare(generating(inputs, NEW), recipe(text), *WAYS, mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", EACH)
def test_left_padded_rows_with_eager_attention(text):
    inputs = padded([170, 131, 20])
    compare(generating(inputs, NEW), recipe(text), "eager", mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_short_prompt_grows_into_packing(text):
    inputs = padded([12, 7])
    compare(generating(inputs, 110), recipe(text), mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_sampling_with_a_seed(text):
    inputs = padded([150, 141])
    run = generating(inputs, 20, seed=5, do_sample=True, temperature=0.7, top_k=20)
    compare(run, recipe(text), mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_num_return_sequences(text):
    inputs = padded([150, 141])
    run = generating(inputs, 16, seed=7, do_sample=True, top_k=10, num_return_sequences=3)
    compare(run, recipe(text), mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_beam_search(text):
    inputs = padded([120, 101])
    run = generating(inputs, 20, num_beams=3, num_return_sequences=2)
    compare(run, recipe(text), *WAYS, mask=inputs["attention_mask"])


@pytest.mark.parametrize("prefill", ["exact", "stored"])
@pytest.mark.parametrize("text", CASES)
def test_prefill_in_chunks(text, prefill):
    inputs = padded([210, 150])
    run = generating(inputs, 12, prefill_chunk_size=64)
    compare(run, recipe(text, prefill=prefill), mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_prompt_lookup(text):
    inputs = unpadded(1, 40)
    inputs = {name: x.repeat(1, 4) for name, x in inputs.items()}  # so that n-grams repeat
    compare(generating(inputs, NEW, prompt_lookup_num_tokens=5), recipe(text))


@pytest.mark.parametrize("text", CASES)
def test_assisted(text):
    """The assistant is a model of one layer that guesses badly: most steps crop."""
    run = generating(unpadded(1, 150), 25, assistant_model=tiny_llama(layers=1))
    compare(run, recipe(text))


@pytest.mark.parametrize("text", EACH)
def test_turns_of_generate_on_one_cache(text):
    model, plan = tiny_llama(), recipe(text)
    first = unpadded(1, 140)

    def talk(model, cache):
        said = generating(first, 20)(model, cache)
        ids = torch.cat([said.tokens, unpadded(1, 45, seed=9)["input_ids"]], 1)
        again = generating({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 20)(model, cache)
        return again._replace(logits=said.logits + again.logits) if again.tokens.shape[1] > ids.shape[1] else said

    with torch.no_grad():
        cache = Shadow(model, plan)
        with kvist.attach(model):
            found = talk(model, cache)
        wanted, *rough = (talk(model, OracleCache(plan, 2, bits=bits, model=model)) for bits in (None, *ROUGH))
    agree(found, wanted, rough)
    assert cache.get_seq_length() == 140 + 20 + 45 + 19


@pytest.mark.parametrize("text", ["int8", "kivi:2 recent=32", *(text for text in CASES if "kvquant" in text)])
def test_turns_of_a_padded_batch_on_one_cache(text):
    """Padding before and between the turns: `generate` gives positions that count tokens alone, so that slots and
    positions part twice in the shorter row."""
    first, second = padded([120, 81]), padded([41, 17], seed=9)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 20, dtype=torch.long), second["attention_mask"]], 1)

    def talk(model, cache):
        said = generating(first, 20)(model, cache)
        inputs = {"input_ids": torch.cat([said.tokens, second["input_ids"]], 1), "attention_mask": mask}
        again = generating(inputs, 20)(model, cache)
        if isinstance(cache, Shadow) and cache.recipe.rotary:
            assert [[(run.slot, run.position) for run in runs] for runs in cache.inner.rows.runs] == [
                [(0, 0)],
                [(39, 0), (164, 101)],
            ]
            assert [cache.inner.rows.shift(row) for row in (0, 1)] == [0, 0]  # so the compiled loops may read its pages
        return again._replace(logits=said.logits + again.logits)

    compare(talk, recipe(text), *WAYS, mask=mask)
