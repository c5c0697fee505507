"""The five parts composed: transform, outliers, range, levels, bits."""

import torch
from pydantic import model_validator
from torch import Tensor

from kvist.coding.grouping import Grouping
from kvist.coding.levels import Levels, Raw, Table, Uniform
from kvist.coding.outliers import NoOutliers, Outliers, Slots
from kvist.coding.ranges import Fixed, MinMax, Range
from kvist.coding.transforms import Identity, Transform
from kvist.kernels.bits import RUN, pack, packed_bytes, unpack
from kvist.kernels.choose import Traits, decoder, encoder
from kvist.kernels.grid import narrow, normalise
from kvist.types import ArraySpec, Part

Arrays = dict[str, Tensor]


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
        if isinstance(self.levels, Raw) and self.outliers.slots:
            raise ValueError("exact values have no outliers")
        if isinstance(self.levels, Raw) and not isinstance(self.transform, Identity):
            raise ValueError("exact values are stored as they come: give them no transform")
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
    def traits(self) -> Traits:
        """What a kernel needs to know."""
        return Traits(
            levels=self.levels.kind,
            bits=self.levels.bits,
            along=self.grouping.along,
            group=self.grouping.size or 0,
            across_heads=self.grouping.across_heads,
            range=self.range.kind,
            outliers=self.outliers.slots,
        )

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
        if self.outliers.slots:
            specs["outlier"] = ArraySpec("rows", 1, (self.outliers.slots,), torch.float16)
            specs["channel"] = ArraySpec("rows", 1, (self.outliers.slots,), torch.int32)
        return specs

    def encode(self, x: Tensor) -> Arrays:
        """Values, any float type, to arrays. Every token is encoded by itself or with its group, never again."""
        if self.raw:
            return {"values": x}
        x = self.transform.forward(x.float())
        fast, _ = encoder(self.traits, x.device)
        return self._reference(x) if fast is None else fast(x)

    def _reference(self, x: Tensor) -> Arrays:
        """`encode`, from values in the transformed space, by torch alone."""
        arrays, escaped = {}, None
        if isinstance(self.outliers, Slots):
            flat = x.movedim(-3, -2).flatten(-2)
            channel = self.outliers.find(flat)
            arrays = {"outlier": narrow(flat.gather(-1, channel)), "channel": channel.int()}
            escaped = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, channel, True)
            escaped = escaped.unflatten(-1, (x.shape[-3], x.shape[-1])).movedim(-2, -3)
        if isinstance(self.range, Fixed):
            scale, offset = self._fixed(x)
        else:
            groups = self.grouping.split(x)
            without = None if escaped is None else self.grouping.split(escaped.float()) > 0
            low, high = self.range.measure(groups, without)
            scale, offset = map(narrow, self.ladder.affine(low, high))
            arrays |= dict(list({"scale": scale, "offset": offset}.items())[: self.range.stored])
            scale, offset = self._affine(arrays, x.shape[-1])
        codes = self.ladder.index(normalise(self._entries(x), scale, offset))
        return {"codes": pack(codes.flatten(-3, -2), self.levels.bits)} | arrays

    def decode(self, arrays: Arrays, *, inverse: bool = True) -> Tensor:
        """Arrays to values (..., H, T, D): fp32, or as stored where nothing was coded. Without `inverse` they stay in
        the transformed space, where attention reads them."""
        if self.raw:
            return arrays["values"]
        fast, _ = decoder(self.traits, arrays["codes"].device)
        x = self._decoded(arrays) if fast is None else fast(arrays)
        return self.transform.inverse(x) if inverse else x

    def _decoded(self, arrays: Arrays) -> Tensor:
        """`decode`, in the transformed space, by torch alone."""
        codes = self._entries(unpack(arrays["codes"], self.levels.bits))
        dim = codes.shape[-1]
        if isinstance(self.range, Fixed):
            scale, offset = self._fixed(codes.flatten(-3, -2))
        else:
            scale, offset = self._affine(arrays, dim)
        x = (self.ladder.point(codes) * scale.float() + offset.float()).flatten(-3, -2)
        if self.outliers.slots:
            flat = x.movedim(-3, -2).flatten(-2)
            flat = flat.scatter(-1, arrays["channel"].long(), arrays["outlier"].float())
            x = flat.unflatten(-1, (x.shape[-3], dim)).movedim(-2, -3)
        return x

    def _entries(self, x: Tensor) -> Tensor:
        """(..., H, T, D) to (..., H, T/granule, granule, D)."""
        return x.unflatten(-2, (-1, self.granule))

    def _affine(self, arrays: Arrays, dim: int) -> tuple[Tensor, Tensor]:
        """Stored scale and offset, broadcasting against `_entries`."""
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

    def _fixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fixed scale and offset, broadcasting against `_entries`."""
        assert isinstance(self.range, Fixed)
        scale, offset = map(narrow, self.ladder.affine(*self.range.table(x.shape[-3], x.device)))
        return scale.float().unsqueeze(-2), offset.float().unsqueeze(-2)

    def __str__(self) -> str:
        if self.raw:
            return "exact"
        size = self.grouping.size or ("token" if self.grouping.across_heads else "head")
        ladder = f"{self.levels.bits}-bit {self.levels.kind}, {self.range.kind} per {size} along {self.grouping.along}"
        extra = [f"{self.outliers.slots} outliers per token"] if self.outliers.slots else []
        extra += [f"{self.transform.kind} space"] if not isinstance(self.transform, Identity) else []
        return ", ".join([ladder, *extra])
