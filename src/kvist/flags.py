"""Fields of dataclasses that a command line sets: name, type, default and help are written once, on the field.

Nothing here knows a command line: `kvist.cli.options` reads the fields.
"""

from collections.abc import Callable
from dataclasses import MISSING, field
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """What a field's `metadata["flag"]` tells beside its name, type and default. names: a letter, such as "-m"; whole
    names, with two dashes, replace that of the field. least: the smallest number. parse: makes the value of a text;
    text: what is parsed by default. place: given by its place, as an argument, and called `metavar`."""

    help: str
    names: tuple[str, ...] = ()
    least: float | None = None
    parse: Callable[[str], Any] | None = None
    text: str | None = None
    place: bool = False
    metavar: str | None = None


def flag(
    default: Any,
    help: str,
    *names: str,
    metavar: str | None = None,
    least: float | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A field that is a flag, `Flag` says of what kind; it must be given where `default` is `...`. A text as the
    default of a field that is parsed is parsed, too."""
    told = Flag(help, names, least, parse, metavar=metavar)
    if parse and isinstance(default, str):
        return _field(parse(default), told._replace(text=default))
    return _field(default, told)


def argument(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field that is given by its place; it must be given where `default` is `...`."""
    return _field(default, Flag(help, place=True, metavar=metavar))


def _field(default: Any, flag: Flag) -> Any:
    return field(default=MISSING if default is ... else default, kw_only=True, metadata={"flag": flag})
