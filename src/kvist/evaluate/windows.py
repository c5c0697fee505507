"""Windows of a text, which several tasks score: the options that choose them, and what is kept of each."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvist import text
from kvist.evaluate.registry import Source
from kvist.evaluate.settings import Chunked, FromWindows

STEP = 32  # tokens per update, of which none is packed before the next update begins
SEQLEN = 2048
BUCKET = 64  # tokens whose mean is a point of a curve


@dataclass(frozen=True)
class Windowed(Chunked, FromWindows):
    """Windows of a text, and what of them goes through the model together; 0 or None: what suits the task."""

    def length(self, source: Source, usual: int = SEQLEN) -> int:
        """Tokens of a window."""
        return self.seqlen or min(usual, source.longest)

    def before(self, seqlen: int, usual: int = 0) -> int:
        """Tokens of the prompt. ValueError where it leaves nothing to score."""
        prompt = self.prompt or usual
        if prompt > seqlen - 2:
            raise ValueError(
                f"a prompt leaves at least 2 of a window's {seqlen} tokens to score, found --prompt {prompt}"
            )
        return prompt


@dataclass(frozen=True)
class Text:
    """Windows int64 (n, seqlen) of a text, the name it is known by, and the hash of its documents."""

    windows: Tensor
    source: str
    digest: str

    @classmethod
    def first(cls, options: Windowed, source: Source, seqlen: int) -> "Text":
        """The first windows, side by side. ValueError where there are fewer than are asked for."""
        found = text.windows(source.tokenizer, source.documents, seqlen, options.windows or None)
        if len(found) < options.windows:
            raise ValueError(
                f"{options.data} has {len(found)} windows of {seqlen} tokens, found --windows {options.windows}; "
                "give 0 for all"
            )
        return cls(found, options.data, text.digest(source.documents))

    @property
    def settings(self) -> dict[str, Any]:
        return {"source": self.source, "data": self.digest, "seqlen": self.windows.shape[1]}


@dataclass(frozen=True)
class OfWindows:
    """What tasks on windows share: an item is a window."""

    text: Text

    @property
    def count(self) -> int:
        return len(self.text.windows)

    def kin(self, item: int) -> None:
        """All windows are of a length."""


def curve(kl: Tensor, bucket: int = BUCKET) -> list[float]:
    """Means of consecutive tokens, `bucket` at a time."""
    return [part.mean().item() for part in kl.split(bucket)]
