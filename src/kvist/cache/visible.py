"""Who sees whom: causality, padding and masks, asked for a few queries and tokens at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvist.cache.rows import Rows
from kvist.kernels.choose import choose, place
from kvist.kernels.contract import Operation, Partial, Request
from kvist.kernels.reference.attend import attend
from kvist.types import HOLD

QUERIES = 512  # query rows that are scored at a time, at most
SCORES = 1 << 22  # scores at a time, whatever the batch and the heads: some copies of them are made


class Look(NamedTuple):
    """How scores become weights: scale, soft cap, and who sees whom."""

    scale: float
    softcap: float | None
    mask: Tensor | None
    horizon: Tensor | None
    rows: Rows
    slots: int
    lengths: list[int]

    @property
    def biased(self) -> bool:
        """Whether a mask is more than what all heads alike may see."""
        return self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape[1] != 1)

    def plain(self, chunked: bool) -> bool:
        """Whether every query sees every packed token; `chunked`: the queries' own tokens are not among these."""
        if self.horizon is not None and not chunked and self.horizon.shape[1] > HOLD:
            return False
        if self.mask is None:
            return True
        if self.mask.device.type != "cpu" or self.mask.dtype != torch.bool:
            return False
        for row, length in enumerate(self.lengths):
            slots = self.rows.slot_of(row, self.mask.device)[:length]
            if not self.mask[min(row, self.mask.shape[0] - 1)][..., slots].all():
                return False
        return True

    def at(self, tokens: Tensor, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Visibility (B, 1 or Hq, m, N) and bias or None, of tokens (B, N) for queries [first, last)."""
        seen = (tokens >= 0)[:, None, None, :]
        if self.horizon is not None:
            seen = seen & (tokens[:, None, :] <= self.horizon[:, first:last, None]).unsqueeze(1)
        if self.mask is None:
            return seen, None
        if self.rows.dense(self.slots):
            slots = tokens.clamp_min(0)
        else:
            none = tokens.new_zeros(1)  # a row without tokens yet still needs a number to look up
            held = (torch.cat([self.rows.slot_of(row, tokens.device), none]) for row in range(len(tokens)))
            slots = torch.stack([h[t.clamp_min(0)] for h, t in zip(held, tokens, strict=True)])
        mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., first:last, :]
        index = slots[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        picked = mask.expand(slots.shape[0], -1, -1, -1).gather(-1, index)
        return (seen & picked, None) if picked.dtype == torch.bool else (seen, picked.float())


def attend_tiled(q: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, look: Look, shift: int = 0) -> Partial:
    """Attention of queries (B, Hq, M, D), the first being number `shift`, to tokens (B, N), some rows at a time.

    keys, values (B, Hk, N, D) may hold anything where `tokens` is -1.
    """
    request = Request(queries=q.shape[2], kept=keys.dtype, biased=look.biased, **place(q.device))
    if (fast := choose(Operation.EXACT, request).run) is not None:
        visible, _ = look.at(tokens, shift, shift + q.shape[2])
        return fast(q, keys, values, visible, look.scale, look.softcap)
    values = values.masked_fill((tokens < 0)[:, None, :, None], 0)
    parts = []
    step = max(HOLD, min(QUERIES, SCORES // (q.shape[0] * q.shape[1] * max(1, keys.shape[2]))))
    for first in range(0, q.shape[2], step):
        last = min(first + step, q.shape[2])
        visible, bias = look.at(tokens, shift + first, shift + last)
        parts.append(attend(q[:, :, first:last], keys, values, look.scale, visible, bias, look.softcap))
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
