"""One file per paper; each returns a Recipe. This room finds them, and holds the one syntax for a method.

Third parties add a method by the entry-point group `kvist.methods` (a module that uses `@method`).
"""

import difflib
import importlib
import inspect
import pkgutil
import shlex
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from pydantic import ValidationError

from kvist.methods.registry import METHODS
from kvist.plan import Recipe

Entry = Callable[..., Recipe]


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="kvist.methods"):
        entry.load()


def names() -> list[str]:
    """All methods, in alphabetical order."""
    _discover()
    return sorted(METHODS)


def entry(name: str) -> Entry:
    """The function behind a name; its signature lists the options, its docstring starts with the idea."""
    _discover()
    if name not in METHODS:
        raise ValueError(f"no method is called {name!r}{_nearest(name, names())}; `kvist methods` lists them")
    return METHODS[name]


def get(name: str, **options) -> Recipe:
    """The recipe of a method. Unknown options and impossible values raise ValueError with the nearest name."""
    function = entry(name)
    parameters = inspect.signature(function).parameters
    for option, value in options.items():
        if option not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, parameters)}; it has: {known}")
        options[option] = _convert(name, option, value, parameters[option].default)
    try:
        return function(**options)
    except ValueError as error:  # pydantic's own message names fields of parts: keep its first sentence
        raise ValueError(f"{name}: {_said(error)}") from None


def parse(text: str) -> Recipe:
    """One syntax everywhere: 'kivi k=2 v=4 group=32', the short form 'kivi:2', or the path of a recipe's JSON."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"expected a method such as 'kivi k=2 v=4', found {text!r}: {str(error).lower()}") from None
    if not words:
        raise ValueError("expected a method such as 'kivi:2' or 'kivi k=2 v=4', found nothing")
    head, *rest = words
    if head.endswith(".json"):
        if rest:
            raise ValueError(f"a recipe's file takes no options, found {' '.join(rest)!r}; edit the file instead")
        return Recipe.load(Path(head))
    name, _, bits = head.partition(":")
    options = {"bits": bits} if bits else {}
    for word in rest:
        option, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"expected option=value, found {word!r}; for example {name} recent=128")
        options[option.replace("-", "_")] = value
    return get(name, **options)


def resolve(method: "str | Recipe | Path", **options) -> Recipe:
    """A Recipe from a Recipe, a method's name or text, or a recipe's JSON file."""
    if isinstance(method, Recipe):
        if options:
            raise ValueError(f"a Recipe takes no options, found {', '.join(options)}; make a new recipe instead")
        return method
    if isinstance(method, Path):
        return Recipe.load(method)
    return get(method, **options) if options else parse(method)


def _said(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    return f"{first['loc'][-1]}: {first['msg'].lower()}, found {first['input']!r}"


def _convert(name: str, option: str, value, default):
    """A command line's word to the type that the option's default has."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, float):
            return float(value)
        numbers = tuple(int(part) for part in value.split(","))
        return numbers[0] if len(numbers) == 1 else numbers
    except (KeyError, ValueError):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name}: {option} must be a number, found {value!r}") from None


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
