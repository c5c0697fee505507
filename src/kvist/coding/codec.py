"""The five parts composed: transform, outliers, range, levels, bits."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from kvist.coding.grouping import Grouping
from kvist.coding.levels import Levels, Raw, Table, Uniform
from kvist.coding.outliers import NoOutliers, Outliers, Slots
from kvist.coding.ranges import Fixed, MinMax, Range
from kvist.coding.transforms import Hadamard, Identity, Transform, Unrotate
from kvist.kernels.choose import coder
from kvist.kernels.contract import RUN, Constants, Operation, Traits, packed_bytes
from kvist.kernels.reference.bits import pack, unpack
from kvist.kernels.reference.grid import FLOAT16_MAX, narrow, normalise
from kvist.types import ArraySpec, Part

Arrays = dict[str, Tensor]
STORED = ("scale", "offset", "outlier")  # in fp16
END = int(np.float16(FLOAT16_MAX).view(np.int16))


class Normalised(NamedTuple):
    """Values on their way to codes. u (..., H, T, D): in units of the ladder; escaped: which of them outlier slots
    took, or None; scale (..., H, T, D): a unit of u; arrays: what is stored beside the codes."""

    u: Tensor
    escaped: Tensor | None
    scale: Tensor
    arrays: Arrays


class Codec(Part):
    """How tokens of one side become arrays. Shapes: values (..., H, T, D), T a multiple of `granule`; arrays as told
    by `layout`, (..., H, T/stride, *shape) for kind "head" and (..., T/stride, *shape) for kind "rows"."""

    levels: Levels
    grouping: Grouping
    range: Range = MinMax()
    outliers: Outliers = NoOutliers()
    transform: Transform = Identity()

    @model_validator(mode="after")
    def _check(self) -> "Codec":
        if isinstance(self.levels, Raw) and isinstance(self.outliers, Slots):
            raise ValueError("exact values have no outliers")
        if isinstance(self.levels, Raw) and not isinstance(self.transform, Identity):
            raise ValueError("exact values are stored as they come: give them no transform")
        if isinstance(self.range, Fixed) and self.grouping.along == "tokens":
            raise ValueError("fixed ranges need no tokens to share them: group along channels")
        if getattr(self.outliers, "rank", "") == "largest" and not isinstance(self.range, Fixed):
            raise ValueError("outliers of rank 'largest' need a fixed range to be large by")
        return self

    @property
    def granule(self) -> int:
        return 1 if self.raw else self.grouping.granule

    @property
    def raw(self) -> bool:
        return isinstance(self.levels, Raw)

    @property
    def ladder(self) -> Uniform | Table:
        """The levels of a codec that is not exact."""
        assert not isinstance(self.levels, Raw)
        return self.levels

    @property
    def unfitted(self) -> tuple[str, ...]:
        """What calibration must still provide, in words."""
        parts = {"a fitted table": self.levels, "fitted ranges": self.range, "a model's rotary": self.transform}
        return tuple(sorted(words for words, part in parts.items() if not getattr(part, "fitted", True)))

    def check(self, heads: int, dim: int) -> None:
        """Refuse numbers per channel that are not for `heads` heads of `dim`: compiled code reads them unchecked.
        Raises ValueError. `encode`, `decode` and whoever makes storage ask this before anything is read."""
        channels = heads * dim
        if isinstance(self.range, Fixed) and len(self.range.low) != channels:
            raise ValueError(
                f"the recipe has fixed ranges of {len(self.range.low)} channels, the model {heads} KV heads of {dim}, "
                f"{channels} channels: it was made for another model; calibrate for this one"
            )
        if isinstance(self.transform, Unrotate) and 2 * len(self.transform.frequencies) > dim:
            raise ValueError(
                f"the recipe turns {2 * len(self.transform.frequencies)} channels of each head by RoPE, the model's "
                f"heads have {dim}: it was made for another model; calibrate for this one"
            )
        if self.unfitted:
            raise ValueError(f"the recipe lacks {' and '.join(self.unfitted)}; calibrate first")
        if not self.raw:
            self.outliers.count(channels)

    @cached_property
    def traits(self) -> Traits:
        """What a kernel needs to know."""
        return Traits(
            levels=self.levels.kind,
            bits=self.levels.bits,
            along=self.grouping.along,
            group=self.grouping.size or 0,
            across_heads=self.grouping.across_heads,
            range=self.range.kind,
            outliers=isinstance(self.outliers, Slots),
            rank=self.outliers.rank if isinstance(self.outliers, Slots) else "",
            rotary=self.transform.style if isinstance(self.transform, Unrotate) else "",
            hadamard=isinstance(self.transform, Hadamard),
        )

    def constants(self, heads: int, device: torch.device) -> Constants:
        """The numbers that a kernel needs beside what is stored."""
        edges = points = scale = offset = frequencies = None
        if isinstance(self.levels, Table):
            edges, points = self.levels.tables(device)
        if isinstance(self.range, Fixed):
            scale, offset = (x.squeeze(-2) for x in self._fixed(heads, device))
        if isinstance(self.transform, Unrotate):
            frequencies = self.transform.table(device)
        return Constants(edges, points, scale, offset, frequencies, getattr(self.transform, "scaling", 1.0))

    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> dict[str, ArraySpec]:
        """The arrays that store tokens of `dim` channels; exact values take `dtype`."""
        if self.raw:
            return {"values": ArraySpec("head", 1, (dim,), dtype)}
        if dim % RUN:
            raise ValueError(f"head sizes must be multiples of {RUN}, found {dim}")
        specs = {"codes": ArraySpec("head", 1, (packed_bytes(dim, self.levels.bits),), torch.uint8)}
        across = self.grouping.across_heads
        numbers = (dim if self.grouping.along == "tokens" else 1 if across else self.grouping.count(dim),)
        kind = "rows" if self.grouping.across_heads else "head"
        for name in ("scale", "offset")[: self.range.stored]:
            specs[name] = ArraySpec(kind, self.granule, numbers, torch.float16)
        if slots := self.outliers.count(heads * dim):
            specs["outlier"] = ArraySpec("rows", 1, (slots,), torch.float16)
            specs["channel"] = ArraySpec("rows", 1, (slots,), torch.uint8 if dim <= 256 else torch.int16)
            specs["ends"] = ArraySpec("rows", 1, (heads,), torch.uint8)  # each head's slots end here
        return specs

    def encode(self, x: Tensor, at: Tensor | None = None) -> Arrays:
        """Quantize: values, any float type, to arrays. Every token is encoded by itself or with its group, never again.

        at (..., T): the positions of the tokens, for transforms that are not fixed. Beside what is stored, a fixed
        range gives "clipped", an int64 number: entries beyond their range that found no slot.
        """
        if self.raw:
            return {"values": x}
        self.check(x.shape[-3], x.shape[-1])
        x = self.transform.forward(x.float(), at)
        fast = coder(Operation.ENCODE, self.traits, x.device)
        return self._reference(x) if fast is None else fast(x, self.constants(x.shape[-3], x.device), self._slots(x))

    def _slots(self, x: Tensor) -> int:
        return self.outliers.count(x.shape[-3] * x.shape[-1])

    def _reference(self, x: Tensor) -> Arrays:
        """`encode`, from values in the transformed space, by torch alone."""
        found = self.normalised(x)
        return {"codes": pack(self.ladder.index(found.u), self.levels.bits)} | found.arrays

    def normalised(self, x: Tensor) -> Normalised:
        """What the ladder is asked about values (..., H, T, D) in the transformed space."""
        arrays, escaped, heads, dim = {}, None, x.shape[-3], x.shape[-1]
        fixed = self._fixed(heads, x.device) if isinstance(self.range, Fixed) else None
        u = normalise(x, *fixed) if fixed else None
        if isinstance(self.outliers, Slots):
            flat = x.movedim(-3, -2).flatten(-2)
            channel = self.outliers.find(flat if u is None else u.movedim(-3, -2).flatten(-2))
            ends = (channel.unsqueeze(-1) // dim <= torch.arange(heads, device=x.device)).sum(-2)
            kind = torch.uint8 if dim <= 256 else torch.int16
            arrays = {"outlier": narrow(flat.gather(-1, channel)), "channel": (channel % dim).to(kind)}
            arrays["ends"] = ends.to(torch.uint8)
            escaped = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, channel, True)
            escaped = escaped.unflatten(-1, (heads, dim)).movedim(-2, -3)
        if fixed and u is not None:
            beyond = self.ladder.beyond(u)
            arrays["clipped"] = (beyond if escaped is None else beyond & ~escaped).sum()
            return Normalised(u, escaped, fixed[0].expand_as(u), arrays)
        groups = self.grouping.split(x)
        without = None if escaped is None else self.grouping.split(escaped.float()) > 0
        low, high = self.range.measure(groups, without)  # pyright: ignore[reportAttributeAccessIssue]
        numbers = map(narrow, self.ladder.affine(low, high))
        arrays |= dict(list(zip(("scale", "offset"), numbers, strict=True))[: self.range.stored])
        entries = self._entries(x)
        scale, offset = self._affine(arrays, dim)
        u = normalise(entries, scale, offset).flatten(-3, -2)
        return Normalised(u, escaped, scale.expand_as(entries).flatten(-3, -2), arrays)

    def saturated(self, arrays: Arrays) -> Tensor | int:
        """How many scales, offsets and outliers lie at fp16's end: values beyond it were clipped. On an accelerator it
        is not waited for."""
        stored = [arrays[name] for name in STORED if name in arrays]
        if stored and stored[0].device.type == "cpu":  # at every step: numpy starts in a tenth of the time
            return sum(np.count_nonzero((x.numpy().view(np.int16) & 0x7FFF) == END) for x in stored)
        return sum((x.abs() == FLOAT16_MAX).sum() for x in stored)

    def decode(self, arrays: Arrays, at: Tensor | None = None, *, inverse: bool = True) -> Tensor:
        """Dequantize: arrays to values (..., H, T, D), fp32, or as stored where nothing was coded. Without `inverse` a
        fixed transform is left in place: attention reads the values there. at (..., T): as for `encode`."""
        if self.raw:
            return arrays["values"]
        codes = arrays["codes"]
        self.check(codes.shape[-3], 8 * codes.shape[-1] // self.levels.bits)
        fast = coder(Operation.DECODE, self.traits, codes.device)
        x = self._decoded(arrays) if fast is None else fast(arrays, self.constants(codes.shape[-3], codes.device))
        return self.transform.inverse(x, at) if inverse or not self.transform.fixed else x

    def _decoded(self, arrays: Arrays) -> Tensor:
        """`decode`, in the transformed space, by torch alone."""
        codes = self._entries(unpack(arrays["codes"], self.levels.bits))
        heads, dim = codes.shape[-4], codes.shape[-1]
        if isinstance(self.range, Fixed):
            scale, offset = (s.unsqueeze(-2) for s in self._fixed(heads, codes.device))
        else:
            scale, offset = self._affine(arrays, dim)
        x = (self.ladder.point(codes) * scale.float() + offset.float()).flatten(-3, -2)
        if isinstance(self.outliers, Slots):
            slot = torch.arange(arrays["channel"].shape[-1], device=x.device)
            head = (arrays["ends"].unsqueeze(-2) <= slot.unsqueeze(-1)).sum(-1)
            flat = x.movedim(-3, -2).flatten(-2)
            channel = (head * dim + arrays["channel"].long()).clamp_(0, heads * dim - 1)  # unused room holds anything
            flat = flat.scatter(-1, channel, arrays["outlier"].float())
            x = flat.unflatten(-1, (heads, dim)).movedim(-2, -3)
        return x

    def _entries(self, x: Tensor) -> Tensor:
        """(..., H, T, D) to (..., H, T/granule, granule, D)."""
        return x.unflatten(-2, (-1, self.granule))

    def _affine(self, arrays: Arrays, dim: int) -> tuple[Tensor, Tensor]:
        """Stored scale and offset (zero point, as a value), broadcasting against `_entries`."""
        scale = arrays["scale"].float()
        if "offset" in arrays:
            offset = arrays["offset"].float()
        else:  # symmetric: low = -high fixes the offset (exactly 0 for a table centred on 0)
            top = scale.new_tensor(1.0)
            unit, low = self.ladder.affine(-top, top)
            offset = scale * (low / unit)
        scale, offset = (self.grouping.spread(s, dim) for s in (scale, offset))
        if self.grouping.along == "tokens":
            return scale, offset
        return scale.unsqueeze(-2), offset.unsqueeze(-2)

    def _fixed(self, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Fixed scale and offset (H, 1, D), fp32 numbers that fp16 holds: thresholds are rounded to fp16, and scale
        and offset formed from them in fp16, as published."""
        assert isinstance(self.range, Fixed)
        return self.range.affine(self.ladder, heads, device)

    def __str__(self) -> str:
        if self.raw:
            return "exact"
        size = self.grouping.size or ("token" if self.grouping.across_heads else "head")
        shared = "channel" if isinstance(self.range, Fixed) else f"{size} along {self.grouping.along}"
        ladder = f"{self.levels.bits}-bit {self.levels.kind}, {self.range.kind} per {shared}"
        extra = []
        if isinstance(self.outliers, Slots):
            many = str(self.outliers.slots) if self.outliers.slots else f"{self.outliers.share:.2g} of the channels"
            extra.append(f"outliers per token: {many}")
        if not isinstance(self.transform, Identity):
            extra.append("before RoPE" if isinstance(self.transform, Unrotate) else f"{self.transform.kind} space")
        return ", ".join([ladder, *extra])
