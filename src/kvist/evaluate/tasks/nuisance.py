"""What should change nothing: padding on the left, other rows in the batch, the prompt's chunks.

A method's own distributions under each of them are compared with those without, and how far both are from the exact
ones. Rounding alone may tip a code over to its neighbour, so divergences are small and not zero; they belong beside
the floor, and shifts should have intervals that include zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvist.evaluate.contenders import Contender, bits, fill
from kvist.evaluate.generation import living, steps, whole
from kvist.evaluate.measures import Dots, Section, average, column
from kvist.evaluate.registry import Source, task
from kvist.evaluate.task import Measured
from kvist.evaluate.tokenwise import Reference, compared, exact
from kvist.evaluate.windows import STEP, OfWindows, Text, Windowed
from kvist.models.adapter import describe

PADDING = 13  # slots: no multiple of a group or a page
FACTORS = ("padding", "batch", "chunk")


@dataclass(frozen=True)
class Nuisance(OfWindows):
    """Windows with a prompt; the tokens behind it are decoded in steps. Each window goes alone, then padded, then
    beside the window after it, then with its prompt read in four chunks."""

    prompt: int
    step: int = STEP
    batch = 1
    name = "nuisance"
    metric = 1
    recipes_only = False

    @property
    def settings(self) -> dict[str, Any]:
        return self.text.settings | {"prompt": self.prompt, "step": self.step, "padding": PADDING}

    @torch.no_grad()
    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        windows, (n,) = self.text.windows, items
        alone, pair = windows[n : n + 1], windows[[n, (n + 1) % len(windows)]]
        plain = exact(model, alone, self.prompt)
        under = {
            "padding": exact(model, alone, self.prompt, padding=PADDING),
            "batch": exact(model, pair, self.prompt),
            "chunk": exact(model, alone, self.prompt, -(-self.prompt // 4)),
        }
        for i, contender in enumerate(contenders):
            logits, size = self._logits(model, contender, plain)
            base = compared(plain, logits, plain.prompt).kl.mean().item()
            own = plain._replace(logits=logits)
            values: dict[str, list] = {"kl": [base]}
            for factor, known in under.items():
                other, _ = self._logits(model, contender, known)
                values[f"kl_{factor}"] = [compared(own, other[:1], own.prompt).kl.mean().item()]
                changed = compared(plain, other[:1], plain.prompt).kl.mean().item()
                values[f"shift_{factor}"] = [changed - base]
            yield Measured(i, size, 0.0, values)

    def _logits(self, model, contender: Contender, known: Reference) -> tuple[Tensor, float]:
        """A contender's logits (B, T, vocabulary) behind the prompt, and its bits."""
        batch, length = known.ids.shape
        with living(model, contender, length) as cache:
            fill(cache, known.states, whole(known.mask[:, : known.prompt]))
            parts = list(steps(model, cache, known.ids, known.mask, known.prompt, self.step))
            return torch.cat(parts, dim=1), bits(cache, describe(model), batch)


@task(
    "nuisance",
    "padding, batch and chunks, which should change nothing",
    options=Windowed,
    statistics={f"{what}_{factor}": average(f"{what}_{factor}") for factor in FACTORS for what in ("kl", "shift")},
    section=Section("nuisance", "What should change nothing"),
    figures=(
        Dots(
            "factors",
            "What should change nothing",
            tuple(f"kl_{factor}" for factor in FACTORS),
            {factor: column(f"kl_{factor}") for factor in FACTORS},
            "KL, nats",
            "KL between a method's own distributions with and without padding on the left, another row in the batch, "
            "and other chunks of the prompt. Grey band: what the same does to the exact cache, and rounding; whiskers: "
            "95 % bootstrap.",
            band=True,
        ),
    ),
)
def nuisance(options: Windowed, source: Source) -> list[Nuisance]:
    seqlen = options.length(source)
    prompt = options.before(seqlen, seqlen // 2)
    return [Nuisance(Text.first(options, source, seqlen), prompt, options.step or STEP)]
