"""What becomes of errors while a text is written: divergence by decode step, and the step where greedy text differs.

History is quantized as it is produced, so that later keys and values are computed from quantized earlier ones. At some
steps the same history is quantized at once, from exact keys and values: the difference is what has accumulated. The
text that the exact model writes greedily is given to the others; until their first other choice they would have
written the same, so that this step is where free-running texts part.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvist.evaluate.contenders import Contender, State, cut, fill
from kvist.evaluate.generation import forward, living, read, states_of, steps
from kvist.evaluate.measures import Curves, Dots, Numbers, Section, Statistic, Values, average
from kvist.evaluate.registry import Source, task
from kvist.evaluate.statistics import Estimate, mean
from kvist.evaluate.task import Measured
from kvist.evaluate.tokenwise import Reference, compared, exact, score
from kvist.evaluate.windows import BUCKET, STEP, OfWindows, Text, Windowed, curve

HORIZON = 1500  # tokens of a window
SKIPPED = 4  # points of a curve


@dataclass(frozen=True)
class Horizon(OfWindows):
    """Windows whose tokens are decoded in steps behind a prompt (may be empty). at: decoded tokens after which the
    same history is quantized at once, too; probe: tokens scored there. free: greedy tokens behind the first half of
    each window, 0 for none."""

    prompt: int = 0
    step: int = 1
    at: tuple[int, ...] = ()
    probe: int = 32
    free: int = 0
    chunk: int = 8192
    batch: int = 1
    name = "horizon"
    metric = 1
    recipes_only = False

    @property
    def settings(self) -> dict[str, Any]:
        own = {"prompt": self.prompt, "step": self.step, "bucket": BUCKET, "at": list(self.at), "probe": self.probe}
        return self.text.settings | own | {"free_steps": self.free, "steps": self.text.windows.shape[1] - self.prompt}

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        known = exact(model, self.text.windows[list(items)], self.prompt, self.chunk)
        states = self._states(model, known) if self.at else []
        written = self._written(model, known) if self.free else None
        for found in score(model, known, contenders, "stored", self.step):
            contender, kl = contenders[found.contender], found.tokens.kl
            began = time.perf_counter()
            at_once: list[list] = [[] for _ in items]
            for step in self.at:
                probed = self._at_once(model, contender, known, states, step)
                part = slice(step, step + probed.shape[1])
                for row, (streamed, once) in enumerate(zip(kl[:, part].mean(1), probed.mean(1), strict=True)):
                    at_once[row].append([step, streamed.item(), once.item()])
            values: dict[str, list] = {
                "kl": kl.mean(1).tolist(),
                "kl_curve": [curve(row) for row in kl],
                "kl_at_once": at_once,
            }
            if written:
                values["first_mismatch"] = self._parted(model, contender, written)
            yield Measured(found.contender, found.bits, found.seconds + time.perf_counter() - began, values)

    @torch.no_grad()
    def _states(self, model, known: Reference) -> list[State]:
        """What whole windows leave in each layer, exactly."""
        cache = DynamicCache(config=model.config)
        read(model, cache, known.ids, known.mask, self.chunk)
        return states_of(cache)

    @torch.no_grad()
    def _at_once(self, model, contender: Contender, known: Reference, states, step: int) -> Tensor:
        """Divergence (B, probe) of the tokens after `step` decoded ones, all history quantized in one update."""
        start = known.prompt + step
        ids, parts = known.ids[:, : start + self.probe], []
        with living(model, contender, ids.shape[1]) as cache:
            fill(cache, cut(states, start), None)
            for logits in steps(model, cache, ids, known.mask, start, self.step):
                parts.append(compared(known, logits, start).kl)
                start += logits.shape[1]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def _written(self, model, known: Reference) -> tuple[Tensor, list[State], Tensor]:
        """The first half of each window (B, P), what it leaves in each layer, and the text that the exact model writes
        behind it (B, free), greedily."""
        ids = known.ids[:, : known.ids.shape[1] // 2]
        cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
        read(model, cache, ids[:, :-1], mask[:, :-1], self.chunk)
        states, token, written = states_of(cache), ids[:, -1:], []
        for _ in range(self.free):
            written.append(token)
            mask = torch.ones(len(ids), ids.shape[1] - 1 + len(written), dtype=torch.long, device=ids.device)
            token = forward(model, cache, token, mask, 1).argmax(-1)
        return ids, states, torch.cat([*written, token], dim=1)

    @torch.no_grad()
    def _parted(self, model, contender: Contender, written) -> list[int]:
        """Per row, how many tokens are written before the first other one; all of them where there is none."""
        ids, states, text = written
        past, same, first = ids.shape[1] - 1, [], 0
        ids = torch.cat([ids[:, :-1], text[:, :-1]], dim=1)
        with living(model, contender, ids.shape[1]) as cache:
            fill(cache, states, None)
            for logits in steps(model, cache, ids, torch.ones_like(ids), past, self.step):
                first += logits.shape[1]
                same.append(logits.argmax(-1) == text[:, first - logits.shape[1] + 1 : first + 1])
        return torch.cat(same, dim=1).long().cumprod(1).sum(1).tolist()


def slopes(values: Values) -> list[float]:
    """Divergence gained per 1,000 steps: least squares per window over its curve, behind the first steps, where
    nothing is packed yet. None for curves that are too short."""
    curves = [curve[SKIPPED:] for curve in values["kl_curve"]]
    if min(map(len, curves)) < 2:
        return []
    steps = np.arange(min(map(len, curves))) * (BUCKET / 1000)
    return [float(np.polyfit(steps, curve[: len(steps)], 1)[0]) for curve in curves]


def _slope(values: Values, seed: int) -> Estimate | None:
    found = slopes(values)
    return mean(found, seed) if found else None


def _probed(which: int) -> Numbers:
    """At the last of the probed steps: 1, streamed; 2, at once. Nothing where none was probed."""
    return lambda values: [float(each[-1][which]) for each in values["kl_at_once"] if each]


@dataclass(frozen=True)
class Options(Windowed):
    """free: greedy tokens behind the first half of each window, until texts part."""

    free: int = 128


@task(
    "horizon",
    "KL by decode step, history quantized as it is produced; where greedy texts part",
    options=Options,
    statistics={
        "slope": Statistic(
            ("kl_curve", "kl_at_once"),
            _slope,
            "KL per 1K steps",
            "growth while decoding; ▲ really grows, = not shown to",
            ("beside",),
            null=slopes,
        ),
        "first_mismatch": average(
            "first_mismatch",
            "text parts at",
            "first greedy token that differs, mean",
            where=("beside",),
            bound="free_steps",
        ),
    },
    section=Section(
        "horizon",
        "Divergence by horizon",
        "Text is decoded step by step; history is quantized as it is produced.",
    ),
    figures=(
        Curves("kl_curve", "decode step, means of {bucket} steps"),
        Dots(
            "at-once",
            "What has accumulated",
            ("kl_at_once",),
            {"streamed": _probed(1), "at once": _probed(2)},
            "KL, nats",
            "At the last of the probed steps: history quantized as it was produced (filled), and the same history "
            "quantized at once (hollow); whiskers: 95 % bootstrap. A strong line: the difference is real (paired, "
            "Holm-corrected in its column).",
            paired=True,
        ),
    ),
)
def horizon(options: Options, source: Source) -> list[Horizon]:
    seqlen = options.length(source, HORIZON)
    if seqlen < 4:
        raise ValueError(f"horizon needs windows of at least 4 tokens, found --seqlen {seqlen}")
    prompt, step = options.before(seqlen), options.step or STEP
    at = tuple(range(STEP * 8, seqlen - prompt - STEP, max(STEP, (seqlen - prompt) // 4 // STEP * STEP)))
    free, text = min(options.free, seqlen // 2), Text.first(options, source, seqlen)
    return [Horizon(text, prompt, step, at, STEP, free, options.chunk, options.batch)]
