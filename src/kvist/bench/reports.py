"""What the benchmarks leave: the schema of their JSON files, by which everyone reads and writes them.

Names in a file are those of a table's columns. The field `bench` says which benchmark it is; files without it, or with
another, are nothing of ours.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from kvist import stranger
from kvist.atomic import replacing
from kvist.types import Part

Number = Annotated[float, Field(ge=0, lt=1e18, allow_inf_nan=False)]
Maybe = Number | None
OURS = re.compile(rb'\s*\{\s*"bench"\s*:\s*"(\w{1,40})"')
Machine = dict[str, str | int | float | bool | None]


class Columns(Part):
    """Fields that are written under the names of columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class DecodeRow(Columns):
    """A contender at a length: milliseconds per step, or why there are none."""

    tokens: PositiveInt
    contender: str
    median_ms: Maybe = Field(None, alias="median ms")
    p10_ms: Maybe = Field(None, alias="p10 ms")
    p90_ms: Maybe = Field(None, alias="p90 ms")
    worst_ms: Maybe = Field(None, alias="worst ms")
    times_dynamic: Maybe = Field(None, alias="x dynamic")
    cache_mib: Maybe = Field(None, alias="cache MiB")
    failed: str | None = None


class EncodeRow(Columns):
    """A side of a method: bulk encoding, its ratio to a copy, a page of 64 tokens, one token."""

    method: str
    side: Literal["keys", "values"]
    rate: Number = Field(alias="MB/s")
    times_copy: Number = Field(alias="x copy")
    page_us: Number = Field(alias="page us")
    token_us: Maybe = Field(None, alias="token us")


class StepsRow(Columns):
    """A contender's time of a token, on all cores and by the clock; a layer's share of the first."""

    contender: str
    batch: PositiveInt
    process_ms: Number = Field(alias="process ms")
    wall_ms: Number = Field(alias="wall ms")
    layer_us: Number = Field(alias="layer us")
    times_dynamic: Number = Field(alias="x dynamic")
    wall_times_dynamic: Number = Field(alias="wall x dynamic")


class ThroughputRow(Columns):
    """A contender at a batch: speeds and bytes, or why it was not run. method: "" for transformers' caches."""

    contender: str
    method: str
    batch: PositiveInt
    predicted_bytes: Maybe = Field(None, alias="predicted bytes")
    predicted_by: str = Field("", alias="predicted by")
    speed: Maybe = Field(None, alias="tokens/s")
    decode_speed: Maybe = Field(None, alias="decode tokens/s")
    prefill_speed: Maybe = Field(None, alias="prefill tokens/s")
    first_token: Maybe = Field(None, alias="first token s")
    cache_bytes: Maybe = Field(None, alias="cache bytes")
    peak_bytes: Maybe = Field(None, alias="peak bytes")
    not_run: str | None = Field(None, alias="not run")
    failed: str | None = None


class Gate(Columns):
    """A check that comes before any comparison: in words, whether it holds, what was found."""

    gate: str
    holds: bool
    found: str


class Drawing(NamedTuple):
    """How results are drawn: a column per size, in these words; the unit; whether less is better; what a dot is."""

    size: str
    unit: str
    lower: bool
    words: str


class Report(Columns):
    """A benchmark's results. look: how they are drawn, if they are."""

    look: ClassVar[Drawing | None] = None

    known: ClassVar[dict[str, type["Report"]]] = {}
    bench: str
    title: str = ""
    machine: Machine = {}

    @property
    def drawn(self) -> dict[int, dict[str, tuple[float, Maybe, Maybe]]]:
        """By size and contender: a number and its ends."""
        return {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        Report.known[cls.model_fields["bench"].default] = cls

    @property
    def data(self) -> dict[str, Any]:
        """As it stands in a file: what was given, by its name there."""
        return {"bench": self.bench} | self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def save(self, path: str | Path | None) -> None:
        """As JSON at `path`, or nowhere; a half-written file never takes its place."""
        if path is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(self.data, indent=1) + "\n")


class Decode(Report):
    """`kvist bench decode`."""

    bench: Literal["decode"] = "decode"
    seed: int = 0
    rows: list[DecodeRow]
    look = Drawing(
        "{:,} tokens", "ms per decode step (whiskers: 10 % and 90 % of the steps)", True, "Median of the steps."
    )

    @property
    def drawn(self) -> dict[int, dict[str, tuple[float, Maybe, Maybe]]]:
        known = [row for row in self.rows if row.median_ms]
        return _by_size([(row.tokens, row.contender, (row.median_ms or 0.0, row.p10_ms, row.p90_ms)) for row in known])


class Encode(Report):
    """`kvist bench encode`."""

    bench: Literal["encode"] = "encode"
    copied: Number = Field(alias="copy MB/s")
    rows: list[EncodeRow]


class Steps(Report):
    """`kvist bench steps`."""

    bench: Literal["steps"] = "steps"
    seed: int = 0
    rows: list[StepsRow]


class Throughput(Report):
    """`kvist bench throughput`. settings, largest and published as its table says them."""

    bench: Literal["throughput"] = "throughput"
    settings: dict[str, Any]
    rows: list[ThroughputRow]
    largest: list[dict[str, Any]] = []
    published: dict[str, Any] = {}
    interrupted: bool = False
    look = Drawing("batch {}", "generated tokens/s, prefill included", False, "One run each, no interval.")

    @property
    def drawn(self) -> dict[int, dict[str, tuple[float, Maybe, Maybe]]]:
        return _by_size([(row.batch, row.contender, (row.speed, None, None)) for row in self.rows if row.speed])


class Gates(Report):
    """Are the ports faithful? Written by runs/leaderboard.py."""

    bench: Literal["gates"] = "gates"
    rows: list[Gate]


def load(path: Path) -> Report | None:
    """A report from a file; None for a file that is none of ours. ValueError where one of ours is damaged."""
    try:
        text = stranger.read(path)
    except ValueError:
        return None
    begun = OURS.match(text)
    try:
        data = stranger.parse(text)
        kind = Report.known.get(str(data.get("bench"))) if isinstance(data, dict) else None
        return TypeAdapter(kind).validate_python(data) if kind else None
    except ValidationError as error:
        first = error.errors()[0]
        where = stranger.printable(" ".join(map(str, first["loc"])))
        reason = f"{where}: {first['msg'].lower()}, found {str(first['input'])[:60]!r}"
    except ValueError as error:
        if begun is None or begun[1].decode() not in Report.known:
            return None
        reason = str(error)
    raise ValueError(f"{path} is a damaged report of `kvist bench`: {reason}; measure it again, or take the file away")


def read_beside(folder: Path) -> list[tuple[str, Report]]:
    """The reports in a folder, by the names of their files."""
    found = ((path.name, load(path)) for path in sorted(folder.glob("*.json")))
    return [(name, report) for name, report in found if report is not None]


def _by_size(rows: list[tuple[int, str, tuple[float, Maybe, Maybe]]]) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for size, contender, ends in rows:
        found.setdefault(size, {})[contender.removeprefix("kvist ")] = ends
    return found
