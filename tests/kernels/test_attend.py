"""Attention with its log-sum-exp, and the merge of parts."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.kernels.contract import Partial
from kvist.kernels.reference.attend import attend, merge

EPS = torch.finfo(torch.float32).eps


def tensors(seed: int, batch=2, heads=6, kv_heads=2, queries=5, tokens=33, dim=24, value_dim=None):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, dim, generator=generator)
    k = torch.randn(batch, kv_heads, tokens, dim, generator=generator)
    v = torch.randn(batch, kv_heads, tokens, value_dim or dim, generator=generator)
    return q, k, v


def dense(q, k, v, scale, visible=None, bias=None, softcap=None):
    """The definition in fp64: (output, log-sum-exp)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def close(partial: Partial, expected, v) -> None:
    """Within fp32 rounding of sums of a few hundred terms as large as the values."""
    out, lse = expected
    tolerance = 256 * EPS * float(v.abs().max())
    assert partial.out.dtype == torch.float32
    torch.testing.assert_close(partial.out.double(), out, rtol=0, atol=tolerance)
    torch.testing.assert_close(partial.lse.double(), lse, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_sdpa_with_grouped_heads(kv_heads, dtype):
    q, k, v = (x.to(dtype) for x in tensors(kv_heads, kv_heads=kv_heads))
    partial = attend(q, k, v, 0.3)
    stock = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(partial.out, stock, rtol=0, atol=256 * EPS * float(v.abs().max()))
    close(partial, dense(q, k, v, 0.3), v)


def test_value_heads_may_have_another_size():
    q, k, v = tensors(0, value_dim=40)
    assert attend(q, k, v, 0.2).out.shape[-1] == 40
    close(attend(q, k, v, 0.2), dense(q, k, v, 0.2), v)


def test_soft_cap_mask_and_bias():
    q, k, v = tensors(1)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(2, 6, 5, 33, generator=generator)
    visible = torch.rand(2, 1, 5, 33, generator=generator) > 0.4
    visible[..., 0] = True
    for options in ({"softcap": 1.5}, {"bias": bias}, {"visible": visible}):
        close(attend(q, k, v, 0.4, **options), dense(q, k, v, 0.4, **options), v)
    close(attend(q, k, v, 0.4, visible, bias, 1.5), dense(q, k, v, 0.4, visible, bias, 1.5), v)


def test_invisible_keys_may_hold_anything():
    q, k, v = tensors(3)
    visible = torch.ones(2, 1, 5, 33, dtype=torch.bool)
    visible[..., 20:] = False
    dirty = k.clone()
    dirty[:, :, 20:] = torch.nan
    partial = attend(q, dirty, v, 0.3, visible)
    close(partial, dense(q, k[:, :, :20], v[:, :, :20], 0.3), v)


def test_a_query_that_sees_nothing():
    q, k, v = tensors(4)
    visible = torch.ones(2, 1, 5, 33, dtype=torch.bool)
    visible[1, :, 2] = False
    partial = attend(q, k, v, 0.3, visible)
    assert torch.equal(partial.out[1, :, 2], torch.zeros(6, 24))
    assert (partial.lse[1, :, 2] == -torch.inf).all()
    assert partial.lse[0].isfinite().all() and partial.out.isfinite().all()
    merged = merge([partial, attend(q, k, v, 0.3, torch.zeros_like(visible))])
    torch.testing.assert_close(merged.out, partial.out, rtol=0, atol=0)
    assert torch.equal(merged.lse, partial.lse)


@pytest.mark.parametrize(("batch", "queries", "tokens"), [(2, 5, 0), (0, 5, 33), (2, 0, 33), (0, 0, 0)])
def test_nothing_attends_to_nothing(batch, queries, tokens):
    q, k, v = tensors(5, batch=batch, queries=queries, tokens=tokens, value_dim=40)
    partial = attend(q, k, v, 0.3, visible=torch.ones(batch, 1, queries, tokens, dtype=torch.bool))
    assert torch.equal(partial.out, torch.zeros(batch, 6, queries, 40))
    assert torch.equal(partial.lse, torch.full((batch, 6, queries), -torch.inf if tokens == 0 else 0.0))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 33), max_size=6), order=st.randoms(use_true_random=False), seed=st.integers(0, 999))
def test_merge_of_any_split_in_any_order_is_the_whole(cuts, order, seed):
    q, k, v = tensors(seed)
    edges = sorted({0, 33, *cuts})
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b], 0.5) for a, b in pairwise(edges)]
    order.shuffle(parts)
    close(merge(parts), dense(q, k, v, 0.5), v)


def test_merge_is_exact_where_one_part_dominates_by_far():
    """Log-sum-exps hundreds apart neither overflow nor lose the larger part."""
    near = Partial(torch.ones(1, 1, 1, 4), torch.full((1, 1, 1), 500.0))
    far = Partial(torch.full((1, 1, 1, 4), 7.0), torch.full((1, 1, 1), -500.0))
    merged = merge([far, near])
    assert torch.equal(merged.out, near.out) and torch.equal(merged.lse, near.lse)


def test_merge_with_a_logit_without_value_is_softmax_with_a_sink():
    q, k, v = tensors(5)
    logit = torch.linspace(-1, 1, 6)
    none = Partial(torch.zeros(2, 6, 5, 24), logit.view(1, -1, 1).expand(2, 6, 5))
    scores = (q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2)) * 0.3
    scores = torch.cat([scores, logit.double().view(1, -1, 1, 1).expand(2, 6, 5, 1)], -1)
    out = scores.softmax(-1)[..., :-1] @ v.double().repeat_interleave(3, 1)
    close(merge([attend(q, k, v, 0.3), none]), (out, scores.logsumexp(-1)), v)
