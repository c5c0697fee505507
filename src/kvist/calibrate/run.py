"""From a model and windows of text to an artefact: look at the text once, then fit as many ladders as are wanted."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from kvist import __version__
from kvist.artifact import Artifact, Fit, Origin, Settings
from kvist.calibrate import tables
from kvist.calibrate.histogram import Histogram
from kvist.calibrate.passes import Passes
from kvist.calibrate.state import State
from kvist.coding import Fixed, Slots, Table, Unrotate
from kvist.models import rope
from kvist.models.adapter import describe, fingerprint
from kvist.models.taps import listen_back
from kvist.types import ModelIdentity

SHORT = 8  # tokens that try a model
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


def quiet(stage: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Observed:
    """What a model did on a text: enough for ladders of any width and kind. `settings`: those that it depends on."""

    model: ModelIdentity
    settings: Settings
    rotary: Unrotate | None
    ranges: Sequence[Fixed | None]
    keys: list[Histogram]
    values: list[Histogram]
    windows: Tensor

    def fit(
        self, settings: Settings, qnorm: Literal["auto", "on", "off"], origin: Origin, progress: Progress = quiet
    ) -> Artifact:
        """Ladders of `settings.bits` and `.levels`; Q-Norm "auto" is on at 2 bits."""
        chosen = {"qnorm": qnorm == "on" or (qnorm == "auto" and settings.bits == 2), "slots": self.settings.slots}
        settings = settings.model_copy(update=chosen)
        sides = []
        for name, found in (("keys", self.keys), ("values", self.values)):
            sides.append([])
            for i, histogram in enumerate(found):
                fixed = self.ranges[i] if name == "keys" else None
                sides[-1].append(Fit(table=_table(histogram, settings), range=fixed))
                progress(f"fit {name}", i + 1, len(found))
        keys, values = map(tuple, sides)
        return Artifact(
            model=self.model, settings=settings, origin=origin, rotary=self.rotary, keys=keys, values=values
        )


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    settings: Settings,
    *,
    source: str,
    digest: str,
    seed: int,
    folder: str | Path,
    qnorm: Literal["auto", "on", "off"] = "auto",
    progress: Progress = quiet,
) -> Artifact:
    """Fit tables and thresholds to `model` on windows (samples, seqlen) of token ids, and save them in `folder`.

    source, digest and seed say where the windows come from. An interrupted run goes on from `folder`. Raises ValueError
    for a model or a text that cannot serve.
    """
    folder = Path(folder)
    state = State(folder, _key(model, settings, windows))
    observed = observe(model, windows, settings, state, progress)
    artifact = observed.fit(settings, qnorm, origin(source, digest, seed, windows), progress)
    artifact.save(folder)
    state.clear()
    return Artifact.load(folder)  # as any later use has it, to the last bit


def observe(
    model: PreTrainedModel, windows: Tensor, settings: Settings, state: State, progress: Progress = quiet
) -> Observed:
    """Show the windows to the model, as often as `settings` need it."""
    facts, rotary = describe(model), None
    if windows.shape[1] <= settings.sinks + 1:
        raise ValueError(f"windows of {windows.shape[1]} tokens leave nothing behind {settings.sinks} sinks")
    if settings.outliers:
        Slots(share=settings.outliers).count(facts.shape.heads * facts.shape.key_dim)  # too many? before the hours
    if settings.keys == "pre-rope":
        rotary = rope.rotary(model)
        rope.check(model, rotary)

    def tick(stage: str, done: int) -> None:
        progress(stage, done, len(windows))

    passes = Passes(model, windows, settings, rotary, len(facts.served), state, tick)
    with at_rest(model):
        if settings.sensitivity != "none":  # a head whose loss is not known is refused before the hours, not after
            listen_back(model, windows[:1, :SHORT].to(next(model.parameters()).device), lambda *told: None)
        ranges = passes.thresholds() if settings.key_axis == "channel" else [None] * passes.layers
        keys, values, slots = passes.histograms(ranges)
    settings = settings.model_copy(update={"slots": slots})
    return Observed(facts.identity, settings, rotary, ranges, keys, values, windows)


def origin(source: str, digest: str, seed: int, windows: Sequence[Tensor] | Tensor) -> Origin:
    """The origin of what is fitted here and now."""
    versions = {"kvist": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    longest = max(len(ids) for ids in windows)
    return Origin(source=source, digest=digest, samples=len(windows), seqlen=longest, seed=seed, versions=versions)


def _key(model: PreTrainedModel, settings: Settings, windows: Tensor) -> str:
    """What progress belongs to: the same whatever ladders are fitted in the end, another one for a fine-tuned model."""
    looked = settings.model_dump(exclude={"bits", "levels", "qnorm"})
    facts = [fingerprint(model), str(model.dtype), looked, list(windows.shape), __version__]
    made = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    made.update(windows.cpu().numpy().tobytes())
    return made.hexdigest()


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode meanwhile."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _table(histogram: Histogram, settings: Settings) -> Table:
    """The ladder of one side of one layer: fitted points on a grid of 256 steps, those of a formula where it has them;
    Q-Norm moves the points that are read."""
    bits = settings.bits
    points = {
        "nuq": lambda: tables.to_grid(tables.fit(histogram, bits)),
        "nf": lambda: tables.normal_float(bits),
        "int": lambda: tables.evenly(bits),
    }[settings.levels]()
    if not settings.qnorm:
        return Table(bits=bits, points=points)
    scale, offset = tables.q_norm(histogram, points)
    return Table(bits=bits, points=points, read=tuple(scale * p + offset for p in points))
