"""Who gets how many bits: a table of widths per layer and side, as JSON that a person can edit."""

from pathlib import Path

from pydantic import ValidationError, model_validator

from kvist.types import Part

WIDTHS = (1, 2, 3, 4, 8, 16)


class Allocation(Part):
    """Bits of keys and of values, one entry per attention layer."""

    k: tuple[int, ...]
    v: tuple[int, ...]

    @model_validator(mode="after")
    def _check(self) -> "Allocation":
        if len(self.k) != len(self.v) or not self.k:
            raise ValueError(f"k and v must list as many layers, found {len(self.k)} and {len(self.v)}")
        for bits in (*self.k, *self.v):
            if bits not in WIDTHS:
                raise ValueError(f"bits must be one of {WIDTHS}, found {bits}")
        return self

    @classmethod
    def of(cls, k: int | tuple[int, ...], v: int | tuple[int, ...]) -> "Allocation":
        """From widths per layer, or one width for all layers; a single number is repeated as often as needed."""
        layers = max(len(x) if isinstance(x, tuple) else 1 for x in (k, v))
        k, v = (x if isinstance(x, tuple) else (x,) * layers for x in (k, v))
        return cls(k=k, v=v)

    @classmethod
    def load(cls, path: str | Path) -> "Allocation":
        """Read {"k": [...], "v": [...]}."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ValueError(f"expected an allocation's JSON file at {path}: {reason}") from None
        except ValidationError as error:
            raise ValueError(
                f'{path} is not an allocation such as {{"k": [2], "v": [2]}}: {error.errors()[0]["msg"]}'
            ) from None
