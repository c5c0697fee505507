"""Outside `no_grad` a forward with a cache gives the same logits, and what is stored has no history."""

import pytest
import torch
from models_tiny import tiny_llama

import kvist
from kvist.models.compat import cache_argument


@pytest.mark.parametrize("method", ["kivi recent=32", "hadamard", "exact"])
@pytest.mark.parametrize("attached", [True, False])
def test_forward_with_gradients_on_gives_the_same_logits(method, attached):
    model = tiny_llama()
    ids = torch.randint(0, 90, (1, 130), generator=torch.Generator().manual_seed(0))
    logits = []
    attachment = kvist.attach(model) if attached else None
    for grad in (False, True):
        cache = kvist.Cache(model, method)
        with torch.set_grad_enabled(grad):
            outs = [model(ids[:, a:b], **cache_argument(cache)).logits for a, b in ((0, 100), (100, 129), (129, 130))]
        logits.append(torch.cat(outs, 1))
    torch.testing.assert_close(logits[1].detach(), logits[0], rtol=1e-4, atol=1e-4)
    if attached and method != "exact":
        with pytest.raises(RuntimeError, match="no gradient"):
            logits[1].sum().backward()
    assert not cache.layers[0].key.exact.ring.requires_grad
    if attachment is not None:
        attachment.close()
