"""What a decode step costs the host, in calls, not in seconds: the same on every machine."""

import sys
from pathlib import Path

import pytest
import torch
from models_tiny import padded, tiny_llama, unpadded

import kvist
from kvist.models.compat import cache_argument
from kvist.testing.cases import EACH, recipe

HERE = str(Path(kvist.__file__).parent)
LAYERS, STEPS, MOST = 4, 12, 25


@pytest.mark.parametrize("rows", ["one", "padded"])
@pytest.mark.parametrize("text", EACH)
def test_a_step_makes_few_calls_per_layer(text, rows):
    """Calls into kvist's code per step of an attached `generate` that a layer more brings with it; those that a forward
    makes however many layers it has (it is heard, and planned) are not among them."""
    model, counted = tiny_llama(layers=LAYERS), [0]
    prompt = unpadded(1, 150) if rows == "one" else padded([150, 90, 141])

    def count(frame, event, _):
        counted[0] += event == "call" and frame.f_code.co_filename.startswith(HERE)

    def generated(tokens: int) -> int:
        counted[0] = 0
        cache = kvist.Cache(model, recipe(text))
        with kvist.attach(model):
            sys.setprofile(count)
            try:
                model.generate(**prompt, **cache_argument(cache), max_new_tokens=tokens, do_sample=False)
            finally:
                sys.setprofile(None)
        cache.close()
        return counted[0]

    generated(4)  # what is compiled, or remembered from then on
    per_forward = (generated(4 + STEPS) - generated(4)) / STEPS
    wide = tiny_llama(layers=2 * LAYERS)
    model = wide
    generated(4)
    per_layer = ((generated(4 + STEPS) - generated(4)) / STEPS - per_forward) / LAYERS
    assert 0 < per_layer <= MOST


def places(cache) -> list[tuple]:
    """Where the storage of each layer lies, and what kernels know of it."""
    return [(layer.bound[1], *(track.exact.ring.data_ptr() for track in layer.tracks)) for layer in cache.inner.ours]


def test_a_step_allocates_its_output_alone():
    """Storage stays where it is: pools, rings and page tables, and what kernels know of them."""
    model = tiny_llama()
    cache = kvist.Cache(model, recipe("kivi:2 recent=32"), reserve=400)
    with torch.no_grad(), kvist.attach(model):
        model(**unpadded(1, 150), **cache_argument(cache))
        model(input_ids=torch.ones(1, 1, dtype=torch.long), **cache_argument(cache))
        before = places(cache)
        for _ in range(100):
            model(input_ids=torch.ones(1, 1, dtype=torch.long), **cache_argument(cache))
    assert before == places(cache)
