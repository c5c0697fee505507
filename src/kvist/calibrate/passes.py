"""The passes over the calibration text: thresholds of key channels, then weighted histograms of what lies within.

Nothing per token is kept. Thresholds need the tails of each channel only; tables need a histogram of each side of each
layer, filled by hooks while the gradients pass (KVQuant sections 3.1, 3.3 and appendix E).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from kvist.artifact import Fit, Settings
from kvist.calibrate.histogram import Histogram
from kvist.calibrate.state import State
from kvist.coding import Codec, Fixed, Table, Unrotate
from kvist.coding.outliers import MOST
from kvist.methods.kvquant import key_codec, value_codec
from kvist.models.taps import Listener, listen, listen_back

BINS = 2048
ENOUGH = 0.999  # of the tokens find a slot for each outlier, where their number is not capped
Tick = Callable[[str, int], None]  # stage, samples done


@dataclass
class Passes:
    """What every pass shares. windows (samples, seqlen) of token ids; layers: those that kvist serves."""

    model: PreTrainedModel
    windows: Tensor
    settings: Settings
    rotary: Unrotate | None
    layers: int
    state: State
    tick: Tick

    def _sweep(self, stage: str, listener: Listener, back: bool = False) -> None:
        """Show the windows that this stage has not seen yet to `listener`."""
        device = next(self.model.parameters()).device
        for i in range(self.state.done.get(stage, 0), len(self.windows)):
            (listen_back if back else listen)(self.model, self.windows[i : i + 1].to(device), listener)
            self.state.step(stage, i + 1)
            self.tick(stage, i + 1)

    def _behind(self, side: int, x: Tensor) -> Tensor:
        """What the codec measures: tokens (H, T, D) behind the sinks, keys before their rotary embedding, fp32."""
        return self._turned_back(x, self.rotary if side == 0 else None)

    def _gradient(self, side: int, x: Tensor) -> Tensor:
        """The gradient of what `_behind` gives: the rotation undone, the factor that YaRN puts on it kept."""
        if side or self.rotary is None:
            return self._turned_back(x, None)
        return self._turned_back(x, self.rotary.model_copy(update={"scaling": 1 / self.rotary.scaling}))

    def _turned_back(self, x: Tensor, rotary: Unrotate | None) -> Tensor:
        x = x[0].float()
        if rotary is not None:
            x = rotary.forward(x, torch.arange(x.shape[-2], device=x.device))
        return x[:, self.settings.sinks :]

    def thresholds(self) -> list[Fixed]:
        """Per layer, the channel's percentiles t and 1 - t, t = 1 - share/2, linearly interpolated; sinks excluded
        (KVQuant section 3.4). Under a cap, the extremes of what is left when every token has filled its slots."""
        tails, tensors = math.floor(self._rank()) + 2, self.state.tensors

        def note(layer: int, side: int, x: Tensor, gradient: Tensor | None) -> None:
            if side == 0:
                values = self._behind(0, x).movedim(1, 0).flatten(1).T  # (C, T)
                for sign, name in ((1, "high"), (-1, "low")):
                    seen = tensors.get(f"{name}.{layer}", values[:, :0]).to(values)
                    seen = torch.cat([seen, values * sign], 1)
                    tensors[f"{name}.{layer}"] = seen.topk(min(tails, seen.shape[1]), 1).values

        self._sweep("thresholds", note)
        found = [Fixed(low=_numbers(-self._tail(i, "low")), high=_numbers(self._tail(i, "high"))) for i in self._each()]
        return self._trimmed(found) if self.settings.cap == "token" and self.settings.outliers else found

    def _each(self) -> range:
        return range(self.layers)

    def _rank(self) -> float:
        """How many of a channel's values lie above its upper threshold."""
        count = len(self.windows) * (self.windows.shape[1] - self.settings.sinks)
        return self.settings.outliers / 2 * (count - 1)

    def _tail(self, layer: int, name: str) -> Tensor:
        values, rank = self.state.tensors[f"{name}.{layer}"].double(), self._rank()
        above, below = values[:, math.floor(rank)], values[:, min(math.ceil(rank), values.shape[1] - 1)]
        return above + (rank - math.floor(rank)) * (below - above)

    def _trimmed(self, first: list[Fixed]) -> list[Fixed]:
        tensors, codecs = self.state.tensors, [self._key_codec(fixed) for fixed in first]

        def note(layer: int, side: int, x: Tensor, gradient: Tensor | None) -> None:
            if side == 0:
                values = self._behind(0, x)
                escaped = codecs[layer].normalised(values).escaped
                assert escaped is not None
                for sign, name in ((1, "most"), (-1, "least")):
                    most = (values * sign).masked_fill(escaped, -torch.inf).amax(1).flatten()
                    seen = tensors.get(f"{name}.{layer}")
                    tensors[f"{name}.{layer}"] = most if seen is None else torch.maximum(most, seen.to(most))

        self._sweep("capped thresholds", note)
        return [self._ends(i, fixed) for i, fixed in enumerate(first)]

    def _ends(self, layer: int, first: Fixed) -> Fixed:
        """The extremes that were found; of a channel that escaped in every token, its percentiles."""
        ends = []
        for sign, name, known in ((-1, "least", first.low), (1, "most", first.high)):
            seen = self.state.tensors[f"{name}.{layer}"]
            ends.append(torch.where(seen.isinf(), torch.tensor(known).to(seen), sign * seen))
        return Fixed(low=_numbers(ends[0]), high=_numbers(ends[1]))

    def _key_codec(self, fixed: Fixed | None) -> Codec:
        """The codec of keys, without table and rotary, as far as ranges and outliers go."""
        settings = self.settings
        if settings.cap == "none" and settings.outliers:
            settings = settings.model_copy(update={"slots": 2})
        return key_codec(settings, Fit(table=Table(bits=settings.bits), range=fixed), None)

    def histograms(self, ranges: Sequence[Fixed | None]) -> tuple[list[Histogram], list[Histogram], int]:
        """Per layer, histograms of normalised keys and values, outliers and sinks left out, weighted by sensitivity:
        F·s², F or nothing, F the squared gradient and s the unit of normalisation (KVQuant appendix E). Also the slots
        that uncapped outliers need."""
        settings, tensors, stage = self.settings, self.state.tensors, "tables"
        values = value_codec(settings, Fit(table=Table(bits=settings.bits)))
        codecs = [(self._key_codec(fixed), values) for fixed in ranges]
        made = {(i, side): self._histogram(f"bins.{side}.{i}") for i in self._each() for side in (0, 1)}

        def note(layer: int, side: int, x: Tensor, gradient: Tensor | None) -> None:
            codec = codecs[layer][side]
            found = codec.normalised(self._behind(side, x))
            escaped, weights = found.escaped, None
            if settings.cap == "none" and side == 0 and settings.outliers and ranges[layer]:
                escaped = found.u.abs() > 1
                needs = torch.bincount(escaped.sum((0, 2)).cpu(), minlength=x.shape[1] * x.shape[3] + 1)
                tensors["needs"] = tensors.get("needs", torch.zeros_like(needs)) + needs
            if gradient is not None:
                weights = self._gradient(side, gradient)
                weights = weights * found.scale if settings.sensitivity == "fisher-scaled" else weights
                weights = weights.square()
            kept = torch.ones_like(found.u, dtype=torch.bool) if escaped is None else ~escaped
            made[layer, side].add(found.u[kept], None if weights is None else weights[kept])
            tensors[f"bins.{side}.{layer}"] = made[layer, side].to_tensor()

        self._sweep(stage, note, back=settings.sensitivity != "none")
        keys, others = ([made[i, side] for i in self._each()] for side in (0, 1))
        return keys, others, self._slots()

    def _histogram(self, name: str) -> Histogram:
        known = self.state.tensors.get(name)
        return Histogram(BINS) if known is None else Histogram.from_tensor(known)

    def _slots(self) -> int:
        needs = self.state.tensors.get("needs")
        if needs is None:
            return 0
        share = needs.cumsum(0) / needs.sum()
        count = int((share < ENOUGH).sum())
        return min(max(2, count + count % 2), MOST)


def _numbers(x: Tensor) -> tuple[float, ...]:
    """fp32 numbers that fp16 holds: thresholds are rounded to fp16 before anything is made of them."""
    return tuple(x.clamp(-65504, 65504).half().float().cpu().tolist())
