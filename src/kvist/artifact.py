"""What calibration learned: tables and thresholds per layer, from what, for which model. Safetensors and JSON.

A folder with `artifact.json`, readable, and `artifact.safetensors`, whose checksum the JSON holds. Points of a table
that lie on 256 even steps are a byte each, beside the two ends; others are fp32 (KVQuant section 3).
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kvist import stranger
from kvist.atomic import replacing
from kvist.coding import Fixed, Table, Unrotate
from kvist.coding.outliers import MOST
from kvist.types import ModelIdentity, Part

FORMAT = 1
JSON, TENSORS = "artifact.json", "artifact.safetensors"
MOST_JSON, MOST_BYTES = 1 << 20, 1 << 28
FLOATS = {torch.float16, torch.float32}


class Settings(Part):
    """How it was fitted. outliers: the share of channels that escape; cap: "token", the same number in every token, or
    "none", those beyond their channel's thresholds (then `slots` is what nearly every token of the calibration needs).
    """

    bits: Literal[2, 3, 4, 5]
    levels: Literal["nuq", "nf", "int"] = "nuq"
    outliers: float = Field(default=0.01, ge=0, lt=0.5)
    cap: Literal["token", "none"] = "token"
    slots: int = Field(default=0, ge=0, le=MOST, multiple_of=2)
    sinks: int = Field(default=1, ge=0)
    keys: Literal["pre-rope", "post-rope"] = "pre-rope"
    key_axis: Literal["channel", "token"] = "channel"
    qnorm: bool = False
    sensitivity: Literal["fisher-scaled", "fisher", "none"] = "fisher-scaled"


class Origin(Part):
    """Where it comes from: text and its hash, or an imported file and its hash; versions of what made it."""

    source: str
    digest: str
    samples: int = 0
    seqlen: int = 0
    seed: int = 0
    versions: dict[str, str] = {}


class Fit(Part):
    """One side of one layer: its table, and the fixed range of its channels, unless that is found online."""

    table: Table
    range: Fixed | None = None


class Artifact(Part):
    """Fitted tables and ranges of keys and values, one per served layer."""

    format: Literal[1] = FORMAT
    method: Literal["kvquant"] = "kvquant"
    model: ModelIdentity
    settings: Settings
    origin: Origin
    rotary: Unrotate | None = None
    keys: tuple[Fit, ...]
    values: tuple[Fit, ...]

    @model_validator(mode="after")
    def _check(self) -> "Artifact":
        if not len(self.keys) == len(self.values) == self.model.layers:
            raise ValueError(
                f"an artefact for {self.model.layers} layers must fit each of them, found {len(self.keys)} of keys and "
                f"{len(self.values)} of values"
            )
        if (self.settings.keys == "pre-rope") != (self.rotary is not None):
            raise ValueError("keys before RoPE need the model's rotary embedding beside them, others must not have it")
        for fit in self.keys:
            if (fit.range is None) != (self.settings.key_axis == "token"):
                raise ValueError("keys per channel have fixed ranges, keys per token have none")
            if fit.range and len(fit.range.low) != self.model.heads * self.model.key_dim:
                raise ValueError(
                    f"keys of {self.model.heads} heads of {self.model.key_dim} need as many ranges, found "
                    f"{len(fit.range.low)}"
                )
        for fit in (*self.keys, *self.values):
            if fit.table.bits != self.settings.bits or not fit.table.fitted:
                raise ValueError(f"expected tables of {self.settings.bits} bits, found one of {fit.table.bits} or none")
        return self

    @property
    def on_grid(self) -> bool:
        """Whether all tables lie on 256 even steps, a byte each in the file."""
        return all(fit.table.grid is not None for fit in (*self.keys, *self.values))

    def __str__(self) -> str:
        s, m = self.settings, self.model
        outliers = f"-{100 * s.outliers:g}%" if s.outliers else ""
        return f"{s.levels}{s.bits}{outliers} for {m.name} ({m.layers} layers, {m.heads} KV heads of {m.key_dim})"

    def save(self, folder: str | Path) -> None:
        """Write the artefact into `folder`, made if it is not there. The JSON, which vouches for the rest, comes last,
        so that an interrupted save leaves what is refused by name."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"expected a folder for the artefact, found a file at {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, fits in (("key", self.keys), ("value", self.values)):
            for i, fit in enumerate(fits):
                tensors |= {f"{name}.{i}.{part}": tensor for part, tensor in _to_tensors(fit).items()}
        data = save_tensors(tensors)
        head = self.model_dump(mode="json", exclude={"keys", "values"}) | {"digest": _digest(data)}
        with replacing(folder / JSON) as vouches, replacing(folder / TENSORS) as scratch:
            scratch.write_bytes(data)
            vouches.write_text(json.dumps(head, indent=2) + "\n")

    def push(self, repository: str) -> str:
        """Save to a model repository on the Hugging Face Hub, made if it is not there; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api.create_repo(repository, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"{self}", allow_patterns=[JSON, TENSORS]
            )
        return str(commit)

    @classmethod
    def find(cls, place: str | Path) -> "Artifact":
        """The artefact in a folder or, where there is no such folder, in a repository OWNER/NAME on the Hub."""
        if Path(place).exists() or str(place).count("/") != 1 or str(place).startswith((".", "~", "/")):
            return cls.load(place)
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(str(place), allow_patterns=[JSON, TENSORS])
        except Exception as error:  # the Hub's client raises many kinds
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"expected an artefact's folder or a repository on the Hub, found {place}: {reason}"
            ) from None
        return cls.load(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Artifact":
        """Read what `save` wrote. Raises ValueError with the reason where it is missing, damaged or of another kind."""
        folder = Path(folder)
        path = folder / JSON
        try:
            head = stranger.read_json(path, MOST_JSON)
            path = folder / TENSORS
            data = stranger.read(path, MOST_BYTES)
        except ValueError as error:
            raise ValueError(
                f"expected an artefact ({JSON} and {TENSORS}) in {folder}: {path.name}: {error}; "
                "`kvist calibrate` makes one"
            ) from None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"{folder} is no artefact of format {FORMAT}; calibrate anew with this release of kvist")
        if head.pop("digest", None) != _digest(data):
            raise ValueError(f"{folder} is damaged: {TENSORS} is not the file that {JSON} was written with")
        try:
            model = ModelIdentity.model_validate(head.get("model"))
            bits = Settings.model_validate(head.get("settings")).bits
            tensors = _Tensors(load_tensors(data), 2**bits, model.heads * model.key_dim)
            fits = {
                side + "s": [tensors.fit(f"{side}.{i}.", bits) for i in range(model.layers)]
                for side in ("key", "value")
            }
            if left := sorted(tensors.found.keys() - tensors.used):
                raise ValueError(f"it has {left[0]!r}, which no layer of the model needs")
            return cls.model_validate(head | fits)
        except ValidationError as error:
            raise ValueError(f"{folder} is no valid artefact: {stranger.said(error)}") from None
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{folder} is damaged: {error}") from None


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _to_tensors(fit: Fit) -> dict[str, Tensor]:
    table, found = fit.table, {}
    for name, points in (("points", table.points), ("read", table.read)):
        if points is None:
            continue
        steps = Table(bits=table.bits, points=points).grid
        if steps is None:
            found[name] = torch.tensor(points, dtype=torch.float32)
        else:
            found |= {name: torch.tensor(steps, dtype=torch.uint8), f"{name}_ends": torch.tensor(points)[[0, -1]]}
    if fit.range:
        found |= {"low": torch.tensor(fit.range.low).half(), "high": torch.tensor(fit.range.high).half()}
    return found


class _Tensors:
    """The tensors of a file, asked for by name; each must have the length that the settings and the model say."""

    def __init__(self, found: dict[str, Tensor], points: int, channels: int):
        self.found, self.used = found, set[str]()
        self.points, self.channels = points, channels

    def fit(self, prefix: str, bits: int) -> dict:
        """What `Fit` is made of, of one side of one layer."""
        table: dict = {"bits": bits, "points": self._table(prefix + "points")}
        if f"{prefix}read" in self.found:
            table["read"] = self._table(prefix + "read")
        found: dict = {"table": table}
        if f"{prefix}low" in self.found:
            found["range"] = {name: self._numbers(prefix + name, self.channels).tolist() for name in ("low", "high")}
        return found

    def _table(self, name: str) -> list[float]:
        points = self._numbers(name, self.points, steps=True)
        if self.found[name].dtype == torch.uint8:
            low, high = self._numbers(f"{name}_ends", 2).tolist()
            points = low + (high - low) * points / 255
        return points.tolist()

    def _numbers(self, name: str, count: int, steps: bool = False) -> Tensor:
        tensor = self.found.get(name)
        if tensor is None:
            raise ValueError(f"it lacks {name!r}")
        known = FLOATS | {torch.uint8} if steps else FLOATS
        if tuple(tensor.shape) != (count,) or tensor.dtype not in known:
            raise ValueError(f"expected {count} numbers in {name!r}, found {tensor.dtype} {tuple(tensor.shape)}")
        self.used.add(name)
        return tensor.double()
