"""One file per paper; each returns a Recipe. This room finds them, and holds the one syntax for a method.

Third parties add a method by the entry-point group `kvist.methods` (a module that uses `@method`).
"""

import difflib
import importlib
import inspect
import pkgutil
import shlex
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvist.allocation import Allocation
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


def defaults(name: str) -> dict[str, Any]:
    """The options of a method with their defaults. Methods with `k` and `v` take an `allocation` as well."""
    found = {option: x.default for option, x in inspect.signature(entry(name)).parameters.items()}
    return found | ({"allocation": ""} if {"k", "v"} <= found.keys() else {})


def get(name: str, **options) -> Recipe:
    """The recipe of a method. Unknown options and impossible values raise ValueError with the nearest name.

    `k` and `v` may be tuples, bits per layer; `allocation` is an Allocation, the path of its JSON file, or what that
    file holds.
    """
    known = defaults(name)
    for option, value in options.items():
        if option == "allocation" and option not in known:
            raise ValueError(f"{name} takes no allocation: it has no bits of keys and values to choose (k and v)")
        if option not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, known)}; it has: {listed}")
        options[option] = _convert(name, option, value, known[option])
    try:
        if table := _table(options, known):
            return _layered(name, table, options, known)
        return entry(name)(**options)
    except ValueError as error:  # pydantic's own message names fields of parts: keep its first sentence
        raise ValueError(f"{name}: {_said(error)}") from None


def _table(options: dict, known: dict) -> Allocation | None:
    """The widths per layer that `options` hold, taken out of them; None where one width per side is for all layers."""
    given = options.pop("allocation", None)
    if given not in (None, ""):
        if mixed := sorted({"bits", "k", "v"} & options.keys()):
            raise ValueError(f"give either an allocation or {' and '.join(mixed)}=, not both")
        if isinstance(given, str | Path):
            return Allocation.load(given)
        if not isinstance(given, Allocation | dict):
            raise ValueError(f'expected an Allocation, its JSON file or {{"k": [3, 2], "v": [4, 2]}}, found {given!r}')
        return Allocation.model_validate(given)
    sides = {side: options.get(side) for side in ("k", "v")}
    if "allocation" not in known or not any(isinstance(own, tuple | list) for own in sides.values()):
        return None
    bits = options.pop("bits", known.get("bits"))
    for side, own in sides.items():
        options.pop(side, None)
        if own is None and bits is None:
            raise ValueError(f"{side} is missing: give k and v, or bits for all that one of them leaves out")
    return Allocation.of(*(bits if own is None else own for own in sides.values()))


def _layered(name: str, table: Allocation, options: dict, known: dict) -> Recipe:
    """One recipe of a layer from each pair of widths."""
    if not options.get("ratios") and "ratios" in known:
        options["ratios"] = table.ratios
    made: dict[tuple[int, int], Recipe] = {}
    layers, count = [], len(table.k)
    for i, pair in enumerate(zip(table.k, table.v, strict=True)):
        try:
            recipe = made[pair] = made.get(pair) or entry(name)(k=pair[0], v=pair[1], **options)
        except ValueError as error:
            raise ValueError(f"layer {i}, k={pair[0]} v={pair[1]}: {_said(error)}") from None
        if recipe.model and table.model:
            table.model.check(recipe.model)
        if len(recipe.layers) == 1 or count == 1:
            layers += recipe.layers
        elif len(recipe.layers) == count:
            layers.append(recipe.layers[i])
        else:
            raise ValueError(f"the artefact has {len(recipe.layers)} layers, the allocation {count}")
    return Recipe.model_validate(dict(recipe) | {"layers": tuple(layers), "model": recipe.model or table.model})


def parse(text: str, **given) -> Recipe:
    """One syntax everywhere: 'kivi k=2 v=4 group=32', the short form 'kivi:2', or the path of a recipe's JSON. Options
    may also be given as keywords."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"expected a method such as 'kivi k=2 v=4', found {text!r}: {str(error).lower()}") from None
    if not words:
        raise ValueError("expected a method such as 'kivi:2' or 'kivi k=2 v=4', found nothing")
    head, *rest = words
    if head.endswith(".json"):
        if rest or given:
            found = " ".join([*rest, *given])
            raise ValueError(f"a recipe's file takes no options, found {found!r}; edit the file instead")
        return Recipe.load(Path(head))
    name, _, bits = head.partition(":")
    options = {"bits": bits} if bits else {}
    for word in rest:
        option, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"expected option=value, found {word!r}; for example {name} recent=128")
        options[option.replace("-", "_")] = value
    if twice := sorted(options.keys() & given.keys()):
        raise ValueError(f"{' and '.join(twice)} of {name} is given twice")
    return get(name, **options, **given)


def widths(text: str, choices: Iterable[int]) -> dict[int, Recipe]:
    """A method with each of these widths that it has, on both sides. Raises ValueError where it has none of them."""
    found, reason = {}, None
    for bits in choices:
        try:
            found[bits] = parse(text, k=bits, v=bits)
        except ValueError as error:
            reason = error
    if reason and not found:
        raise reason
    return found


def resolve(method: "str | Recipe | Path", **options) -> Recipe:
    """A Recipe from a Recipe, a method's name or text, or a recipe's JSON file."""
    if isinstance(method, str):
        return parse(method, **options)
    if options:
        raise ValueError(f"a Recipe takes no options, found {', '.join(options)}; make a new recipe instead")
    return method if isinstance(method, Recipe) else Recipe.load(method)


def _said(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    field = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "it")
    return f"{field}: {first['msg'].lower()}, found {first['input']!r}"


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
