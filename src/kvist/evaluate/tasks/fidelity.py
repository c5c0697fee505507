"""How far a method's next-token distributions are from the exact ones, and its perplexity: windows of text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvist.evaluate.contenders import Contender
from kvist.evaluate.measures import KL, LIKELIHOOD, Curves, Section, Statistic, Values, average
from kvist.evaluate.registry import Source, task
from kvist.evaluate.settings import Mode, Moded, OfLengths
from kvist.evaluate.statistics import Estimate, mean, perplexity
from kvist.evaluate.task import Measured
from kvist.evaluate.tokenwise import Scores, exact, score
from kvist.evaluate.windows import BUCKET, STEP, OfWindows, Text, Windowed, curve

LAST = 256  # tokens scored at the end of long windows
PER_DECADE, LEAST = 20, -12.0  # bins of divergences: a quantile of all tokens is known to 6 %


@dataclass(frozen=True)
class Windows(OfWindows):
    """What both tasks share. prompt: tokens of each window whose keys and values are exact when attention sees them;
    step: tokens per update behind it, None for one update; chunk: tokens of a prompt read together."""

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


def _quantile(share: float, word: str, *where) -> Statistic:
    why = "of all scored tokens, from bins of 12 %"
    return Statistic(("kl_counts",), lambda values, seed: quantile(values["kl_counts"], share), word, why, where)


def _among(name: str, word: str, why: str) -> Statistic:
    """The mean of the windows that have such tokens."""

    def made(values: Values, seed: int) -> Estimate | None:
        means = [kl for _, kl in values[name] if kl is not None]
        return mean(means, seed) if means else None

    return Statistic((name,), made, word, why, ("apart",))


_ANY = "of any scored token"
AGREEMENT = average("agreement", "same first, %", "share of tokens where both put the same one first", share=True)
PERPLEXITY = Statistic(
    ("nll", "tokens"),
    lambda values, seed: perplexity(values["nll"], values["tokens"], seed),
    "perplexity",
    "of the scored tokens",
)


@dataclass(frozen=True)
class Options(Moded, Windowed):
    """Windows, and how they are scored."""


@dataclass(frozen=True)
class LongOptions(OfLengths, Options):
    """Where lengths are given, `seqlen` does not count."""


@task(
    "fidelity",
    "KL from the exact cache: mean, quantiles, by position",
    options=Options,
    statistics={
        "kl_median": _quantile(0.5, "median", "apart"),
        "kl_99.9%": _quantile(0.999, "KL, 99.9 %", "table", "apart"),
        "perplexity": PERPLEXITY,
        "agreement": AGREEMENT,
        "kl_max": Statistic(("kl_max",), lambda values, seed: max(values["kl_max"]), "largest", _ANY, ("apart",)),
        "kl_inside": _among("inside", "nothing packed", "tokens scored while all was exact still, mean of windows"),
        "kl_beyond": _among("beyond", "packed", "tokens scored when some were packed, mean of windows"),
        "kl_last": _among("last", "last quarter", "of the scored tokens, mean of windows"),
    },
    section=Section("position", "Divergence by position, keys and values"),
    figures=(Curves("kl_curve", "position in the window, means of {bucket} tokens", "prompt"),),
    floors=True,
)
def fidelity(options: Options, source: Source) -> list[Fidelity]:
    seqlen, mode = options.length(source), options.mode or "stored"
    prompt, step = options.before(seqlen), None if mode == "simulated" else options.step or STEP
    return [Fidelity(Text.first(options, source, seqlen), mode, prompt, step, options.chunk, options.batch)]


@task(
    "ppl",
    "perplexity, of windows or of the last tokens of long ones",
    options=LongOptions,
    statistics={"agreement": AGREEMENT, "perplexity": PERPLEXITY},
    compared={"log_perplexity": LIKELIHOOD, "kl": KL},
)
def ppl(options: LongOptions, source: Source) -> list[Perplexity]:
    step, more = options.step or STEP, (options.chunk, options.batch)
    if options.lengths:
        texts = [Text.first(options, source, length) for length in options.lengths]
        befores = [length - max(2, min(LAST, length // 2)) for length in options.lengths]
        return [Perplexity(text, "stored", at, step, *more) for text, at in zip(texts, befores, strict=True)]
    seqlen, streamed = options.length(source), options.prompt or options.step
    text, prompt = Text.first(options, source, seqlen), options.before(seqlen)
    return [Perplexity(text, options.mode or "stored", prompt, step if streamed else None, *more)]
