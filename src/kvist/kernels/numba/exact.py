"""Attention of a few queries to a few exact tokens on a CPU: windows, sinks, pins, where torch's overhead would rule.

Works on the rings as they lie, in the model's own type: no copy, no conversion, and no room beyond the output.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kvist.kernels.contract import Partial
from kvist.kernels.numba.codes import FAST
from kvist.kernels.numba.layout import FLOAT, KINDS, load

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@njit(**FAST)
def _scores(q, x, row, scale, softcap, scores):
    for r in range(q.shape[0]):
        query, total = q[r], np.float32(0.0)
        for d in range(x.shape[0]):
            total += query[d] * x[d]
        total *= scale
        scores[r, row] = np.float32(math.tanh(total / softcap) * softcap) if softcap > 0 else total


@njit(**FAST)
def _attend(q, keys, values, k_kind, v_kind, visible, scale, softcap, out, lse):
    """q (B, H, R, D); keys, values (B, H, N, D); visible (B, 1 or M, N), query row r being number r mod M."""
    batch, heads, rows, dim = q.shape
    tokens, queries = keys.shape[2], visible.shape[1]
    x = np.empty(max(dim, values.shape[3]), np.float32)
    scores = np.empty((rows, tokens), np.float32)
    for b in range(batch):
        for h in range(heads):
            scores[:] = np.float32(-np.inf)
            acc, limit = out[b, h], lse[b, h]
            for t in range(tokens):
                if visible[b, :, t].any():
                    if k_kind == FLOAT:
                        _scores(q[b, h], keys[b, h, t].view(np.float32), t, scale, softcap, scores)
                    else:
                        load(keys[b, h, t], k_kind, x[:dim])
                        _scores(q[b, h], x[:dim], t, scale, softcap, scores)
            for r in range(rows):
                seen, line = visible[b, r % queries], scores[r]
                top = np.float32(-np.inf)
                for t in range(tokens):
                    if seen[t]:
                        top = max(top, line[t])
                total = np.float32(0.0)
                for t in range(tokens):
                    weight = np.float32(math.exp(line[t] - top)) if seen[t] and top > -np.inf else np.float32(0.0)
                    line[t] = weight
                    total += weight
                norm = np.float32(1.0) / total if total > 0 else np.float32(0.0)
                for t in range(tokens):
                    line[t] *= norm
                limit[r] = top + np.float32(math.log(total)) if total > 0 else np.float32(-np.inf)
            for t in range(tokens):
                if not visible[b, :, t].any():
                    continue
                value = x[: values.shape[3]]
                if v_kind == FLOAT:
                    value = values[b, h, t].view(np.float32)
                else:
                    load(values[b, h, t], v_kind, value)
                for r in range(rows):
                    weight, sums = scores[r, t], acc[r]
                    if weight > 0:
                        for d in range(value.shape[0]):
                            sums[d] += weight * value[d]


def attend_exact(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Partial:
    """See `choose`: EXACT."""
    batch, heads, queries, dim = q.shape
    grouped = q.reshape(batch, keys.shape[1], -1, dim).numpy()
    out = torch.zeros(*grouped.shape[:3], values.shape[-1])
    lse = torch.empty(grouped.shape[:3])
    seen = visible.squeeze(1).contiguous().numpy()
    k, v = (x.view(BITS[x.dtype]).numpy() for x in (keys, values))
    kinds = KINDS[keys.dtype], KINDS[values.dtype]
    numbers = np.float32(scale), np.float32(softcap or 0.0)
    _attend(grouped, k, v, *kinds, seen, *numbers, out.numpy(), lse.numpy())
    return Partial(out.view(batch, heads, queries, -1), lse.view(batch, heads, queries))
