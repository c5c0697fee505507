"""What tasks can be told, each option once: groups that the options of tasks are made of, and all of them together.

Nothing heavy is imported: `kvist eval` has a flag for each, and its help is to be quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvist.flags import flag
from kvist.units import parse_count, parse_counts

Mode = Literal["simulated", "stored"]
Prefill = Literal["exact", "stored"]


@dataclass(frozen=True)
class Named:
    """A text by name."""

    data: str = flag("wikitext2", "A text file (also .xz), or wikitext2 or c4.")
    split: str = flag("test", "test, valid or train: which of a name's texts.")


@dataclass(frozen=True)
class Kept:
    """Data that are kept in a folder, under data/, or come from the hub."""

    data_dir: Path | None = flag(None, "The folder where names of data are looked up, instead of the hub.")


@dataclass(frozen=True)
class FromText(Kept, Named):
    """A text, as `kvist.text.texts` finds it."""


@dataclass(frozen=True)
class FromWindows(FromText):
    """Windows of a text."""

    windows: int = flag(16, "The first N windows; 0: all.", "-n", least=0)
    seqlen: int = flag(0, "Tokens per window.  [default: 2048, horizon 1500, or the model's most]", parse=parse_count)
    prompt: int | None = flag(None, "Tokens of a window that are read exactly before others are scored.", least=0)
    step: int | None = flag(
        None, "Tokens per update while decoding; 1 is true decoding.  [default: 32; ppl: whole]", least=1
    )


@dataclass(frozen=True)
class Moded:
    """How text is scored."""

    mode: Mode | None = flag(
        None,
        "stored: what a living cache holds; simulated: all tokens in one pass, as published.  "
        "[default: stored; lm-eval: simulated]",
    )


@dataclass(frozen=True)
class OfLengths:
    """Several lengths; without, what suits the model."""

    lengths: tuple[int, ...] = flag(
        (), "Of contexts, 1K,2K; for ppl, windows of which the last 256 tokens are scored.", parse=parse_counts
    )


@dataclass(frozen=True)
class Planted(OfLengths):
    """Facts planted in contexts: how many depths, from the start to the end, and questions of each."""

    depths: int = flag(5, "How many depths of a planted fact.", least=1)
    samples: int = flag(4, "Questions per length and depth.", least=1)
    seed: int = flag(0, "Of questions, planted outliers and intervals.")


@dataclass(frozen=True)
class Batched:
    """What goes through the model together."""

    batch: int = flag(8, "Items that go through the model together.", least=1)


@dataclass(frozen=True)
class Chunked(Batched):
    """And how much of a prompt does."""

    chunk: int = flag(8192, "A longer prompt is read in chunks of so many tokens.", least=1)


@dataclass(frozen=True)
class Asked(Chunked):
    """Questions about a context, answered by generating."""

    prefill: Prefill = flag("exact", "Of questions' contexts: exact, as published; stored, read from what is stored.")


@dataclass(frozen=True)
class Chatty:
    """In which form a model is asked."""

    chat: bool = flag(False, "Questions go through the model's chat template.")


@dataclass(frozen=True)
class FewShot(Chatty):
    """After how many examples."""

    shots: int | None = flag(None, "Examples before a question.  [default: gsm8k 5; lm-eval: the task's]", least=0)


@dataclass(frozen=True)
class Defined:
    """Tasks that lm-eval's files define."""

    tasks_dir: Path | None = flag(None, "A folder with definitions for lm-eval of your own.")


@dataclass(frozen=True)
class Settings(Defined, FewShot, Asked, Planted, Moded, FromWindows):
    """What is said for all tasks at once; each takes what it has. Fields of the last base come first."""
