"""What attention allocates: nothing that grows with what is stored. Read from the profiler's allocation events."""

import pytest
import torch
from models_tiny import llama_config, padded, sharpen, tiny_llama, tokens
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

import kvist
from kvist.cache import visible
from kvist.cache.handle import Handle
from kvist.cache.view import View
from kvist.models.compat import cache_argument
from kvist.testing.cases import CASES, EACH, recipe

HEADS, QUERIES, DIM = 2, 8, 128
SIXTEEN = 16 << 10


def peak(work) -> int:
    """Bytes that `work()` holds at its worst beyond what was held before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = worst = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        worst = max(worst, held)
    return worst


def wide(text: str, layers: int, reserve: int = 0, **options) -> kvist.Cache:
    """A cache of layers with 2 KV heads of 128, without the cost of a model that large."""
    config = llama_config(layers, heads=QUERIES, kv_heads=HEADS, dim=DIM)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    return kvist.Cache(model, recipe(text, DIM, **options), reserve=reserve)


def pair(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1, HEADS, count, DIM)
    return tuple(torch.randn(shape, generator=generator).bfloat16())


def filled(text: str, count: int, layers: int = 1, **options) -> kvist.Cache:
    """`count` random tokens, in updates of 2048."""
    cache = wide(text, layers, reserve=count + 8192, **options)
    for start in range(0, count, 2048):
        keys, values = pair(min(2048, count - start), start)
        cache.announce(1, keys.shape[2], None)
        for layer in range(layers):
            cache.update(keys, values, layer)
    return cache


def step_bytes(cache: kvist.Cache) -> int:
    """Transient bytes of one decode step of the first layer."""
    query = torch.randn(1, QUERIES, 1, DIM).bfloat16()
    keys, values = pair(1)
    layer = cache.layers[0]

    def step():
        cache.announce(1, 1, None)
        handle, _ = cache.update(keys, values, 0)
        view = View.after(layer) if not isinstance(handle, Handle) else handle.source
        view.attend(query, DIM**-0.5)

    return peak(step)


PACKED = [text for text in EACH if text != "exact"]


@pytest.mark.parametrize("text", PACKED)
def test_decode_step_is_constant_in_the_context(text):
    bound = max(1 << 20, 2 * HEADS * DIM * 2 * SIXTEEN // 20)
    found = [step_bytes(filled(text, count)) for count in (SIXTEEN // 4, SIXTEEN)]
    assert max(found) <= bound, f"{found} bytes at 4K and 16K, at most {bound}"


@pytest.mark.parametrize("text", ["kivi:2", "logquant", "int8"])
def test_prefill_chunk_does_not_grow_with_the_past(text):
    """Two layers, a chunk of 512 after 4K and after 24K tokens: the attention over the past goes tile by tile."""
    query = torch.randn(1, QUERIES, 512, DIM).bfloat16()
    found = []
    for past in (4 << 10, 24 << 10):
        cache, keys_values = filled(text, past, layers=2), pair(512)

        def chunk(cache=cache, keys_values=keys_values):
            cache.announce(1, 512, None)
            for layer in (0, 1):
                handle, _ = cache.update(*keys_values, layer)
                handle.source.attend(query, DIM**-0.5)

        found.append(peak(chunk))
    tables = cache.report().allocated["tables"]  # stored, and made anew at every update
    assert found[1] <= found[0] + tables, f"{found} bytes after 4K and 24K tokens"


def test_scores_of_a_chunk_are_made_a_few_queries_at_a_time(monkeypatch):
    """The same attention to the last digits of fp32, whatever is scored at a time; and less held meanwhile."""
    cache, query = filled("kivi:2", 1024), torch.randn(1, QUERIES, 512, DIM)
    cache.announce(1, 512, None)
    handle, _ = cache.update(*pair(512), 0)
    outs, found = [], []
    for scores in (1 << 40, 1):
        monkeypatch.setattr(visible, "SCORES", scores)
        outs.append(handle.source.attend(query, DIM**-0.5))
        found.append(peak(lambda: handle.source.attend(query, DIM**-0.5)))
    assert torch.allclose(*outs, atol=1e-5) and found[1] < found[0] / 2, found


@pytest.mark.parametrize("text", CASES)
def test_attached_decode_never_decodes_a_track(text, monkeypatch):
    model, plan, inputs = tiny_llama(), recipe(text), padded([150, 120])
    if not plan.layers[0].packs:
        pytest.skip("nothing is packed")

    def refuse(self, side):
        raise AssertionError("a whole track was decoded")

    monkeypatch.setattr(View, "dense", refuse)
    with kvist.attach(model):
        out = model.generate(**inputs, **cache_argument(kvist.Cache(model, plan)), max_new_tokens=40, do_sample=False)
    assert out.shape == (2, 190)


def test_not_attached_decodes_and_says_so(monkeypatch):
    """The guard of the test above does catch a decoded track."""
    model, calls, dense = tiny_llama(), [], View.dense
    monkeypatch.setattr(View, "dense", lambda self, side: calls.append(side) or dense(self, side))
    model.set_attn_implementation("eager")
    try:
        model.generate(tokens(1, 100), **cache_argument(kvist.Cache(model, "kivi:2 recent=32")), max_new_tokens=3)
    finally:
        model.set_attn_implementation("sdpa")
    assert calls


def test_sharpened_weights_are_the_same_at_every_call():
    first, second = (sharpen(LlamaForCausalLM(llama_config())) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
