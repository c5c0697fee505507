"""Attention over a stretch of keys and values, with its log-sum-exp, and the merge of such parts. The reference.

Softmax attention over a set of tokens is determined by its normalised output and the log of its normaliser; two
disjoint sets combine exactly from these two numbers (split-KV, flash-decoding). All arithmetic is fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.kernels.contract import Partial


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Queries (B, Hq, M, D) over keys and values (B, Hk, N, D); Hk divides Hq, as in grouped-query attention.

    `visible`, bool, and `bias`, additive, broadcast to (B, 1 or Hq, M, N). Invisible keys may hold anything, NaN
    included; invisible values must be finite. A query that sees nothing gets zeros and lse = -inf.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    rows = heads // kv_heads * queries  # spelled out: with no tokens, or no rows, torch could not tell what -1 is
    grouped = q.float().reshape(batch, kv_heads, rows, dim)
    scores = torch.matmul(grouped, k.float().transpose(-1, -2)).mul_(scale)
    scores = scores.view(batch, heads, queries, tokens)
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill_(~visible, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = scores.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_()
    out = torch.matmul(weights.view(batch, kv_heads, rows, tokens), v.float())
    return Partial(out.view(batch, heads, queries, v.shape[-1]), lse)


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint token sets, from the attention over each of them."""
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([p.lse for p in partials])
    total = torch.logsumexp(lses, dim=0)
    weights = (lses - total.masked_fill(total == -torch.inf, 0)).exp_()
    out = torch.zeros_like(partials[0].out)
    for weight, partial in zip(weights, partials, strict=True):
        out.addcmul_(weight.unsqueeze(-1), partial.out)
    return Partial(out, total)
