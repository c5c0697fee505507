"""A dense reference: transformers' own cache, with keys and values rounded in place when the published rules say so.

It shares no code with the living cache: rules are replayed token by token, and rounding is written out.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

GROUP = 32
Rule = Callable[[int, int], set[int]]  # (length of the prompt, length now) to the tokens that are packed and not exact


def kivi_keys(recent: int) -> Rule:
    return lambda prompt, length: set(range(length // recent * recent // GROUP * GROUP))


def kivi_values(recent: int) -> Rule:
    return lambda prompt, length: set(range(max(0, length - recent)))


def log_sparse(window: int, granule: int) -> Rule:
    """The published recurrence as lists; whole groups of `granule` are packed."""

    def packed(prompt: int, length: int) -> set[int]:
        log, recent = [], list(range(prompt))
        if prompt > window:
            while len(recent) >= 3 * window:
                recent = recent[: 2 * window][::2] + recent[2 * window :]
            log, recent = recent[:window], recent[window:]
        for token in range(prompt, length):
            recent.append(token)
            if len(recent) == 2 * window:
                log, recent = ((log + recent[:window])[::2] if log else recent[:window]), recent[window:]
        frontier = (length - len(recent)) // granule * granule
        return set(range(frontier)) - set(log)

    return packed


def rounded(x: Tensor, bits: int) -> Tensor:
    """Asymmetric rounding of groups in the last dimension, scale and offset kept in fp16."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def rounded_keys(keys: Tensor, bits: int) -> Tensor:
    """Every whole group of 32 tokens rounded per channel; what is left stays."""
    whole = keys.shape[2] // GROUP * GROUP
    groups = keys[:, :, :whole].unflatten(2, (-1, GROUP)).transpose(-1, -2)
    return torch.cat([rounded(groups, bits).transpose(-1, -2).flatten(2, 3), keys[:, :, whole:]], 2)


def rounded_values(values: Tensor, bits: int) -> Tensor:
    """Every group of up to 32 channels rounded per token."""
    return torch.cat([rounded(part, bits) for part in values.split(GROUP, -1)], -1)


class RoundedLayer(DynamicLayer):
    """What an update sees: its own tokens exact, of earlier ones those that the rule had packed by then rounded."""

    def __init__(self, keys: Rule, values: Rule, bits: int):
        super().__init__()
        self.rules, self.bits, self.prompt = (keys, values), bits, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        keys, values = super().update(key_states, value_states)
        if not before:
            self.prompt = keys.shape[2]
            return keys, values
        sides = ((keys, rounded_keys, self.rules[0]), (values, rounded_values, self.rules[1]))
        return tuple(self._seen(x, rounding, rule, before) for x, rounding, rule in sides)

    def _seen(self, x: Tensor, rounding, rule: Rule, before: int) -> Tensor:
        packed = sorted(rule(self.prompt, before))
        seen = x.clone()
        seen[:, :, packed] = rounding(x.float(), self.bits)[:, :, packed].to(x.dtype)
        return seen


def rounded_cache(model, method: str, bits: int, window: int) -> DynamicCache:
    """The reference for "kivi" or "logquant" at groups of 32; sliding layers are transformers' own."""
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if layer.is_sliding:
            continue
        if method == "kivi":
            cache.layers[i] = RoundedLayer(kivi_keys(window), kivi_values(window), bits)
        else:
            cache.layers[i] = RoundedLayer(log_sparse(window, GROUP), log_sparse(window, 1), bits)
    return cache
