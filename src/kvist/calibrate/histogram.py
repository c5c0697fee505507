"""A weighted histogram of normalised values: all that calibration keeps of millions of activations."""

import numpy as np
import torch
from torch import Tensor

ROWS = 6  # count, Σv, Σv², Σw, Σwv, Σwv²
CHUNK = 1 << 20  # values binned at once: bounds the memory beside the activations to some 50 MB


class Histogram:
    """Moments of values in [-1, 1], per bin of equal width; values beyond are clipped to the ends.

    Each bin holds the number of its values, their sum and sum of squares, and the same three under weights (the
    sensitivities of KVQuant section 3.3), all in fp64 on the CPU. Means and variances of everything added are
    therefore exact; only which side of a boundary a value falls on is known to a bin's width, 2/bins.
    """

    def __init__(self, bins: int = 2048):
        if bins < 1:
            raise ValueError(f"a histogram has at least 1 bin, found bins={bins}")
        self._moments = torch.zeros(ROWS, bins, dtype=torch.float64)

    @property
    def bins(self) -> int:
        return self._moments.shape[1]

    @torch.no_grad()
    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Count `values` (any shape, device and floating dtype; taken in fp32), each with its weight, or 1.

        weights: non-negative and finite, of a shape that broadcasts to that of `values`. The work is done where the
        values are; only the bins travel. Raises ValueError, and adds nothing, where a value is NaN or a weight is
        negative or not finite.
        """
        if values.numel() == 0:
            return
        if weights is not None:
            try:
                weights = weights.to(values.device).expand_as(values).reshape(-1)
            except RuntimeError:
                shapes = f"{tuple(weights.shape)} for values of shape {tuple(values.shape)}"
                raise ValueError(f"weights must broadcast to their values, found weights of shape {shapes}") from None
        flat = values.reshape(-1)
        new = torch.zeros_like(self._moments)
        for start in range(0, flat.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            new += self._bin(flat[part], None if weights is None else weights[part])
        if not new.isfinite().all():
            raise ValueError("values must be numbers and weights finite, found NaN or an infinite weight")
        self._moments += new

    def _bin(self, values: Tensor, weights: Tensor | None) -> Tensor:
        # MPS has no fp64, CUDA no reproducible weighted bincount
        if values.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
            values, weights = values.cpu(), None if weights is None else weights.cpu()
        values = values.float().clamp(-1, 1)
        # NaN becomes an integer of no meaning; kept in range here, it still shows in the sums
        index = ((values + 1) * (self.bins / 2)).long().clamp_(0, self.bins - 1)

        def total(each: Tensor) -> Tensor:
            return torch.bincount(index, each, minlength=self.bins)

        exact = values.double()
        plain = [torch.bincount(index, minlength=self.bins).double(), total(exact), total(exact * exact)]
        if weights is None:
            return torch.stack(plain * 2).cpu()
        weights = weights.double()
        if weights.min() < 0:
            raise ValueError(f"weights must not be negative, found {float(weights.min()):g}")
        weighted = weights * exact
        return torch.stack([*plain, total(weights), total(weighted), total(weighted * exact)]).cpu()

    def __iadd__(self, other: "Histogram") -> "Histogram":
        if other.bins != self.bins:
            raise ValueError(f"histograms add only with equal bins, found {self.bins} and {other.bins}")
        self._moments += other._moments
        return self

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self._moments[0].sum())

    @property
    def weight(self) -> float:
        """The sum of all weights."""
        return float(self._moments[3].sum())

    @property
    def moments(self) -> np.ndarray:
        """Count, sum and sum of squares of each bin, unweighted: fp64 (3, bins)."""
        return self._moments[:3].numpy().copy()

    @property
    def weighted_moments(self) -> np.ndarray:
        """Per bin the sum of weights, of weight·value and of weight·value², (3, bins); of plain counts where no value
        has any weight."""
        return self._moments[3:].numpy() if self.weight > 0 else self.moments

    @property
    def centroids(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and total weight of each bin that holds a value, fp64, ascending. The mean is the weighted one, or
        the plain one where a bin's weights are all zero. Where that is so in every bin, the weights returned are the
        counts."""
        count, plain, _, weight, weighted, _ = self._moments.numpy()
        if not weight.any():
            weight, weighted = count, plain
        held = count > 0
        heavy = held & (weight > 0)
        mean = np.divide(plain, count, out=np.zeros_like(plain), where=held)
        np.divide(weighted, weight, out=mean, where=heavy)
        return np.clip(mean[held], -1, 1), weight[held]

    def to_tensor(self) -> Tensor:
        """All that is held, fp64 (6, bins), on the CPU: per bin count, Σv, Σv², Σw, Σwv, Σwv²."""
        return self._moments.clone()

    @classmethod
    def from_tensor(cls, moments: Tensor) -> "Histogram":
        """The histogram that `to_tensor` wrote. Raises ValueError for another shape or dtype, or impossible counts."""
        if moments.ndim != 2 or moments.shape[0] != ROWS or moments.dtype != torch.float64:
            found = f"{tuple(moments.shape)} of {moments.dtype}"
            raise ValueError(f"a stored histogram is fp64 of shape ({ROWS}, bins), found {found}; calibrate again")
        if not moments.isfinite().all() or (moments[[0, 2, 3, 5]] < 0).any():
            raise ValueError("a stored histogram holds finite sums and counts of at least 0; calibrate again")
        histogram = cls(moments.shape[1])
        histogram._moments.copy_(moments)
        return histogram
