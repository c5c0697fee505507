"""How far a method's next-token distributions are from the exact ones, and its perplexity: windows of text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvist.evaluate.contenders import Contender
from kvist.evaluate.task import Measured
from kvist.evaluate.tokenwise import Mode, Scores, exact, score

BUCKET = 64  # tokens whose mean is a point of a curve
PER_DECADE, LEAST = 20, -12.0  # bins of divergences: a quantile of all tokens is known to 6 %


@dataclass(frozen=True)
class Text:
    """Windows int64 (n, seqlen) of a text, the name it is known by, and the hash of its documents."""

    windows: Tensor
    source: str
    digest: str

    @property
    def settings(self) -> dict[str, Any]:
        return {"source": self.source, "data": self.digest, "seqlen": self.windows.shape[1]}


@dataclass(frozen=True)
class Windows:
    """What tasks on windows share. prompt: tokens of each window whose keys and values are exact when attention sees
    them; step: tokens per update behind it, None for one update; chunk: tokens of a prompt read together."""

    text: Text
    mode: Mode = "stored"
    prompt: int = 0
    step: int | None = None
    chunk: int = 8192
    batch: int = 1
    metric = 1

    @property
    def settings(self) -> dict[str, Any]:
        return self.text.settings | {"mode": self.mode, "prompt": self.prompt, "step": self.step, "bucket": BUCKET}

    @property
    def count(self) -> int:
        return len(self.text.windows)

    def kin(self, item: int) -> None:
        """All windows are of a length."""

    @property
    def recipes_only(self) -> bool:
        return self.mode == "simulated" or not self.step

    def scores(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Scores]:
        known = exact(model, self.text.windows[list(items)], self.prompt, self.chunk)
        return score(model, known, contenders, self.mode, self.step)


@dataclass(frozen=True)
class Perplexity(Windows):
    """Likelihood and divergence per window, of the tokens behind the prompt."""

    name = "ppl"

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        for found in self.scores(model, contenders, items):
            yield Measured(found.contender, found.bits, found.seconds, summed(found))


@dataclass(frozen=True)
class Fidelity(Windows):
    """Divergence per window: its mean, its distribution, its course, and where nothing was packed yet."""

    name = "fidelity"

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        for found in self.scores(model, contenders, items):
            kl, packed = found.tokens.kl, found.packed
            last = torch.arange(kl.shape[1]) >= kl.shape[1] - kl.shape[1] // 4
            values = summed(found) | {
                "kl_max": kl.max(1).values.tolist(),
                "kl_counts": [counts(row) for row in kl],
                "kl_curve": [curve(row) for row in kl],
                "inside": [among(row, ~packed) for row in kl],
                "beyond": [among(row, packed) for row in kl],
                "last": [among(row, last) for row in kl],
            }
            yield Measured(found.contender, found.bits, found.seconds, values)


def summed(found: Scores) -> dict[str, list]:
    """Per window: mean divergence, summed likelihood, tokens scored, share of equal first choices."""
    kl, nll, same = found.tokens
    return {
        "kl": kl.mean(1).tolist(),
        "nll": nll.sum(1).tolist(),
        "tokens": [kl.shape[1]] * len(kl),
        "agreement": same.double().mean(1).tolist(),
    }


def curve(kl: Tensor, bucket: int = BUCKET) -> list[float]:
    """Means of consecutive tokens, `bucket` at a time."""
    return [part.mean().item() for part in kl.split(bucket)]


def among(kl: Tensor, which: Tensor) -> list:
    """How many of the tokens, and their mean, or None."""
    chosen = kl[which]
    return [len(chosen), chosen.mean().item() if len(chosen) else None]


def counts(kl: Tensor) -> dict[str, int]:
    """How many tokens fall into each of the bins of equal ratio; those below all of them into the first."""
    floor = 10.0**LEAST
    bins = (kl.clamp_min(floor).log10() * PER_DECADE).floor().to(torch.int64)
    numbers, how_many = bins.unique(return_counts=True)
    return {str(n): c for n, c in zip(numbers.tolist(), how_many.tolist(), strict=True)}


def quantile(every: Sequence[dict[str, int]], share: float) -> float:
    """The quantile of all tokens of several windows, from their bins' counts: the middle of the bin where it lies."""
    total: dict[int, int] = {}
    for one in every:
        for bin_, count in one.items():
            total[int(bin_)] = total.get(int(bin_), 0) + count
    wanted, passed = share * sum(total.values()), 0
    for bin_ in sorted(total):
        passed += total[bin_]
        if passed >= wanted:
            return 0.0 if bin_ <= LEAST * PER_DECADE else 10 ** ((bin_ + 0.5) / PER_DECADE)
    return math.nan
