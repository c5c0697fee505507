"""A command is a function of dataclasses, whose fields are its flags (`kvist.flags`); groups that commands share."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from kvist.flags import flag

MODEL = "A model's folder, GGUF file or name on the Hugging Face Hub, or smollm2."


@dataclass(frozen=True)
class Where:
    """Where a model computes, and in what."""

    device: str = flag("auto", "auto, cpu, cuda, cuda:1 …")
    dtype: str = flag("auto", "auto (as saved; CPUs: what is fast), float32, float16 or bfloat16.")


@dataclass(frozen=True)
class Data:
    """Text that something is drawn from."""

    data_dir: Path | None = flag(None, "A folder of data, with train/NAME.txt or .txt.xz.")


@dataclass(frozen=True)
class Generation:
    """How text is read and written."""

    raw: bool = flag(False, "The prompt as it is, without the model's chat template.")
    max_new_tokens: int = flag(256, "Most tokens to write, per turn.", least=1)
    greedy: bool = flag(False, "Always the likeliest token, instead of sampling.")
    temperature: float = flag(1.0, "Of sampling; above 0.")
    seed: int = flag(0, "Of sampling.")
    reserve: int = flag(0, "Tokens for which room is set aside at once; the cache grows beyond.", least=0)
    prefill: Literal["exact", "stored"] | None = flag(
        None, "exact: a prompt attends to itself in full precision; stored: to what is stored."
    )
    chunk: int = flag(8192, "A longer prompt is read in chunks of so many tokens.", least=1)
    attach: bool = flag(True, "Attention that reads packed pages; without, they are decoded each step.")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer calls it: with a parameter for each field of the dataclasses that it takes."""
    groups = {name: kind for name, kind in get_type_hints(function).items() if name != "return"}
    known = {name: _fields(kind) for name, kind in groups.items()}

    @wraps(function)
    def called(**given: Any) -> None:
        def made(name: str) -> Any:
            said = [(each, of) for each, of in known[name] if given[each.name] not in (None, [])]
            return groups[name](**{each.name: _value(each, of, given[each.name]) for each, of in said})

        function(**{name: made(name) for name in groups})

    called.__signature__ = inspect.Signature([_parameter(*each) for own in known.values() for each in own])  # pyright: ignore
    called.__annotations__ = {}
    return called


def _fields(group: type) -> list[tuple[Field, Any]]:
    """The fields of a dataclass with their types, without `| None`."""
    found, hints = [], get_type_hints(group)
    for each in fields(group):
        inner = get_args(hints[each.name])
        found.append((each, inner[0] if NoneType in inner else hints[each.name]))
    return found


def _parameter(field: Field, of: Any) -> inspect.Parameter:
    """A field as typer reads a parameter: a text for what is parsed or chosen here, a list for a tuple."""
    told, default = field.metadata["flag"], field.default
    text = told.parse or get_origin(of) is Literal
    kind = str if text else list[get_args(of)[0]] if get_origin(of) is tuple else of
    if told.place:
        info = typer.Argument(help=told.help, metavar=told.metavar)
    else:
        whole = any(name.startswith("--") for name in told.names) or (of is bool and default is True)
        names = told.names if whole else (_said(field), *told.names)
        info = typer.Option(*names, help=told.help, metavar=told.metavar, min=told.least)
    if default is MISSING:
        default = inspect.Parameter.empty
    else:
        kind |= None
        default = told.text if told.parse else list(default) or None if isinstance(default, tuple) else default
    kind = Annotated[kind, info]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _value(field: Field, of: Any, given: Any) -> Any:
    """What was given, as the field has it. ValueError for what cannot be parsed, or is none of its choices."""
    told, choices = field.metadata["flag"], get_args(of) if get_origin(of) is Literal else None
    if choices and given not in choices:
        raise ValueError(f"{_said(field)} is one of {', '.join(choices)}, found {given!r}")
    return told.parse(given) if told.parse else tuple(given) if isinstance(given, list) else given


def _said(field: Field) -> str:
    return "--" + field.name.replace("_", "-")
