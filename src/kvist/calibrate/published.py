"""The quantizer files that KVQuant's authors publish (their LWM and DBRX models), as artefacts.

Per layer and side a tuple: upper and lower thresholds, of channels for keys; a codebook, unsorted, one for the layer;
and in some 2-bit files Q-Norm's scale and offset. Bits, outliers, sinks and the model are not in the file.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

import kvist
from kvist.artifact import Artifact, Fit, Origin, Settings
from kvist.calibrate.pickled import MOST_BYTES, read
from kvist.calibrate.tables import evenly, normal_float
from kvist.coding import Fixed, Slots, Table
from kvist.coding.outliers import MOST
from kvist.kernels.reference.grid import FLOAT16_MAX
from kvist.models.adapter import Model, describe
from kvist.models.rope import rotary

SIDES = {"k_proj": "key", "v_proj": "value"}
DEFAULTS: dict[str, tuple[Literal["token", "none"], int]] = {"llama": ("token", 5), "dbrx": ("none", 1)}  # cap, sinks
OTHERWISE: tuple[Literal["token", "none"], int] = ("token", 1)
FORMULAS: dict[str, Callable[[int], tuple[float, ...]]] = {"nf": normal_float, "int": evenly}


@dataclass(frozen=True)
class Quantizer:
    """One side of one layer. low, high: thresholds as they are in the file, of keys; points: the codebook, ascending,
    fp64; read: what Q-Norm makes of it, fp64."""

    low: Tensor | None
    high: Tensor | None
    points: np.ndarray | None
    read: np.ndarray | None


@dataclass(frozen=True)
class Published:
    """A quantizer file: its name and hash, and its quantizers by side and layer."""

    name: str
    digest: str
    key: dict[int, Quantizer]
    value: dict[int, Quantizer]


def load(path: str | Path) -> Published:
    """Read a quantizer file; nothing in it is run. Raises ValueError with the reason for anything that is not one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a quantizer file of KVQuant (.pickle), found no file at {path}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; quantizer files have at most {MOST_BYTES}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the quantizer file {path} cannot be read: {error.strerror}") from None
    found: dict[str, dict[int, Quantizer]] = {"key": {}, "value": {}}
    try:
        entries = read(data)
        if not isinstance(entries, dict) or not entries:
            raise ValueError("it holds no dict of layers")
        for name, entry in entries.items():
            if ".lut" in name:
                continue
            side, layer = _place(name)
            if layer in found[side]:
                raise ValueError(f"it holds the {side}s of layer {layer} twice")
            try:
                found[side][layer] = _quantizer(entry, side)
            except ValueError as error:
                raise ValueError(f"{side}s of layer {layer}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is no quantizer file of KVQuant: {error}") from error
    return Published(path.name, hashlib.blake2b(data, digest_size=16).hexdigest(), **found)


def to_artifact(
    published: Published,
    model: nn.Module,
    *,
    outliers: float = 0.01,
    cap: str | None = None,
    sinks: int | None = None,
    slots: int | None = None,
    levels: str | None = None,
    bits: int | None = None,
) -> Artifact:
    """The artefact of a quantizer file for a model, which may be on the meta device.

    outliers: share of the channels that escape. cap ("token" or "none") and sinks default to what the file's family was
    published with: ("token", 5) for llama, ("none", 1) for dbrx, ("token", 1) for others. slots: of keys per token with
    cap none, by default twice what the share gives. levels ("nf" or "int") and bits: for files without codebooks.
    Thresholds are rounded to fp16 first, as the published code does. Raises ValueError where file, model and options do
    not fit.
    """
    facts = describe(model)
    _check_layers(published, facts)
    keys, values = ([side[layer] for layer in facts.served] for side in (published.key, published.value))
    usual_cap, usual_sinks = DEFAULTS.get(facts.name, OTHERWISE)
    found_levels, found_bits = _ladder([*keys, *values], levels, bits)
    cap = usual_cap if cap is None else cap
    if cap not in ("token", "none"):
        raise ValueError(f"the cap of outliers is 'token' or 'none', found {cap!r}")
    if sinks is not None and sinks < 0:
        raise ValueError(f"sinks must be at least 0, found {sinks}")
    channels = facts.shape.heads * facts.shape.key_dim
    settings = Settings(
        bits=cast(Any, found_bits),
        levels=cast(Any, found_levels),
        outliers=outliers,
        cap=cap,
        slots=_slots(slots, cap, outliers, channels),
        sinks=usual_sinks if sinks is None else sinks,
        qnorm=any(q.read is not None for q in (*keys, *values)),
        sensitivity="fisher" if found_levels == "nuq" else "none",
    )
    if outliers:
        Slots(share=outliers).count(channels)  # whether they fit the model
    tables = {"levels": found_levels, "bits": found_bits}
    return Artifact(
        model=facts.identity,
        settings=settings,
        origin=Origin(
            source=published.name,
            digest=published.digest,
            versions={"kvist": kvist.__version__, "torch": torch.__version__},
        ),
        rotary=rotary(model),
        keys=tuple(
            Fit(table=_table(q, **tables), range=_range(q, channels, layer))
            for q, layer in zip(keys, facts.served, strict=True)
        ),
        values=tuple(Fit(table=_table(q, **tables)) for q in values),
    )


def _place(name: str) -> tuple[str, int]:
    """The side and layer of model.layers.3.self_attn.k_proj or transformer.blocks.3.k_proj."""
    words = name.split(".")
    numbers = [word for word in words if word.isascii() and word.isdigit() and len(word) <= 6]
    if words[-1] not in SIDES or len(numbers) != 1:
        raise ValueError(f"expected keys such as model.layers.0.self_attn.k_proj, found {ascii(name)[:80]}")
    return SIDES[words[-1]], int(numbers[0])


def _quantizer(entry: Any, side: str) -> Quantizer:
    """A value of the file by position; what follows is ignored, and so are the thresholds of values, which are those of
    the calibration's tokens."""
    if not isinstance(entry, tuple) or len(entry) < 2:
        raise ValueError("expected a tuple of at least two thresholds")
    low = high = points = moved = None
    if side == "key":
        high, low = entry[:2]
        if not (isinstance(low, Tensor) and isinstance(high, Tensor)):
            raise ValueError("its thresholds are no tensors")
        if low.shape != high.shape or low.shape[:-1].numel() != 1:
            raise ValueError(f"expected thresholds of one shape (1, channels), found {[*low.shape]}, {[*high.shape]}")
        if not all(x.isfinite().all() and x.abs().max() <= FLOAT16_MAX for x in (low, high) if x.numel()):
            raise ValueError("its thresholds are not finite numbers of fp16")
        if (low > high).any():
            raise ValueError("its lower thresholds exceed the upper ones")
        low, high = low.flatten(), high.flatten()
    if len(entry) > 2 and isinstance(entry[2], list | np.ndarray):
        points = _codebook(entry[2])
        if len(entry) > 4:
            scale, offset = (_scalar(x) for x in entry[3:5])
            if scale <= 0:
                raise ValueError(f"the scale of its Q-Norm must be above 0, found {scale}")
            moved = points * scale + offset
            if not np.abs(moved).max() <= FLOAT16_MAX:
                raise ValueError("its Q-Norm leaves the range of fp16")
    return Quantizer(low, high, points, moved)


def _codebook(item: Any) -> np.ndarray:
    """Ascending fp64 points."""
    array = item[0] if isinstance(item, list) and len(item) == 1 else item
    if not isinstance(array, np.ndarray) or array.dtype.itemsize < 4:
        raise ValueError("its codebook is no array of fp32 or fp64")
    if array.size not in (4, 8, 16, 32) or array.shape[0] != array.size:
        raise ValueError(f"expected a codebook of 4, 8, 16 or 32 points, found an array {list(array.shape)}")
    with np.errstate(invalid="ignore"):
        points = np.sort(array.astype(np.float64).ravel())
    if not np.abs(points).max() <= FLOAT16_MAX:  # NaN among them
        raise ValueError("its codebook is not of finite numbers of fp16")
    return points


def _scalar(item: Any) -> float:
    if isinstance(item, Tensor) and item.numel() == 1 and item.dtype != torch.float16:
        number = item.item()
        if abs(number) <= FLOAT16_MAX:
            return number
    raise ValueError("expected Q-Norm's scale and offset as moderate numbers of fp32 or fp64")


def _check_layers(published: Published, facts: Model) -> None:
    for name, side in (("keys", published.key), ("values", published.value)):
        layers = len(facts.kinds)
        if missing := [layer for layer in facts.served if layer not in side]:
            raise ValueError(
                f"{published.name} lacks the {name} of layer {missing[0]}; {facts.name} has {layers} layers, the file "
                f"{len(side)}"
            )
        if max(side) >= layers:
            raise ValueError(f"{published.name} has {name} of layer {max(side)}; {facts.name} has {layers} layers")


def _ladder(quantizers: list[Quantizer], levels: str | None, bits: int | None) -> tuple[str, int]:
    """The kind of levels and their bits, from the codebooks, or from the options where there are none."""
    sizes = {0 if q.points is None else len(q.points) for q in quantizers}
    if len(sizes) > 1:
        raise ValueError(f"expected codebooks of one size in all layers, found {sorted(sizes)} points")
    if size := sizes.pop():
        found = size.bit_length() - 1
        if levels not in (None, "nuq") or bits not in (None, found):
            raise ValueError(f"the file has codebooks of {found} bits; leave --levels and --bits out")
        return "nuq", found
    if levels not in FORMULAS or bits not in (2, 3, 4, 5):
        raise ValueError("the file has no codebooks; say what it was made for: --levels nf or int, and --bits 2 to 5")
    return levels, bits


def _slots(slots: int | None, cap: str, outliers: float, channels: int) -> int:
    most = min(MOST, channels) // 2 * 2
    if cap == "token":
        if slots is not None:
            raise ValueError("--slots is for --cap none; with --cap token the share of outliers says how many")
        return 0
    if slots is None:
        return min(2 * Slots(share=outliers).count(channels), most) if outliers else 0
    if not 0 <= slots <= most or slots % 2:
        raise ValueError(f"--slots must be an even number from 0 to {most}, found {slots}")
    return slots


def _half(values: Tensor) -> tuple[float, ...]:
    """Rounded to fp16."""
    return tuple(values.half().tolist())


def _table(quantizer: Quantizer, levels: str, bits: int) -> Table:
    """Points in fp32, the precision in which the published program looks them up and an artefact keeps them."""
    points = np.asarray(FORMULAS[levels](bits)) if quantizer.points is None else quantizer.points
    found = [None if x is None else tuple(torch.as_tensor(x).float().tolist()) for x in (points, quantizer.read)]
    return Table(bits=cast(Any, bits), points=found[0] or (), read=found[1])


def _range(quantizer: Quantizer, channels: int, layer: int) -> Fixed:
    assert quantizer.low is not None and quantizer.high is not None
    if len(quantizer.low) != channels:
        raise ValueError(f"layer {layer}: expected thresholds of {channels} key channels, found {len(quantizer.low)}")
    return Fixed(low=_half(quantizer.low), high=_half(quantizer.high))
