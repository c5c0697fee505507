"""Options are dataclasses: what a line says is what a command is given, and every flag is written once."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from kvist.artifact import Settings as Fitting
from kvist.cli.app import app
from kvist.cli.calibrate import Chosen
from kvist.cli.errors import Verbs
from kvist.cli.options import command
from kvist.evaluate.registry import kinds
from kvist.evaluate.settings import Settings
from kvist.flags import argument, flag
from kvist.units import parse_count, parse_counts


@dataclass(frozen=True)
class Group:
    name: str = argument(..., "A name.", metavar="NAME")
    out: Path = flag(..., "A file.", "-o")
    method: tuple[str, ...] = flag(("a", "b"), "Repeatable.", "-m")
    length: tuple[int, ...] = flag((), "Repeatable.", least=1)
    mode: Literal["slow", "quick"] | None = flag(None, "slow or quick.")
    context: int = flag("32K", "Tokens.", parse=parse_count)
    lengths: tuple[int, ...] = flag((), "Tokens.", parse=parse_counts)
    seqlen: int = flag(0, "Tokens.  [default: all]", parse=parse_count)
    floor: bool = flag(True, "Measured.")
    old: bool = flag(False, "As it was.", "--old/--new")


@dataclass(frozen=True)
class Other:
    two_words: bool = flag(False, "A switch.")
    share: float = flag(0.5, "A share.")


def call(*words: str, code: int = 0):
    """What the command was given, and what was printed."""
    given = []

    @command
    def go(group: Group, other: Other) -> None:
        """Example: go."""
        given.append((group, other))

    program = typer.Typer(cls=Verbs, add_completion=False, rich_markup_mode=None)
    program.command("go")(go)
    program.command("other")(lambda: None)
    result = CliRunner().invoke(program, ["go", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return given[0] if given else None, result


def test_what_is_left_out_is_the_default():
    assert call("x", "-o", "f")[0] == (Group(name="x", out=Path("f")), Other())


def test_what_is_said_arrives_in_its_type():
    words = "x --out f -m c --method d --length 3 --length 4 --mode quick --context 1K --lengths 1K,2 --seqlen 2K"
    (group, other), _ = call(*words.split(), "--no-floor", "--old", "--two-words", "--share", "0.25")
    lists = {"method": ("c", "d"), "length": (3, 4), "lengths": (1024, 2), "context": 1024, "seqlen": 2048}
    assert group == Group(name="x", out=Path("f"), mode="quick", floor=False, old=True, **lists)
    assert other == Other(two_words=True, share=0.25) and isinstance(group.method, tuple)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-o f", "Missing argument"),
        ("x", "Missing option '--out'"),
        ("x -o f --mode fast", "--mode is one of slow, quick, found 'fast'"),
        ("x -o f --context many", "expected a number of tokens such as '4096' or '128K', found 'many'"),
        ("x -o f --length 0", "--length"),
        ("x -o f --no-two-words", "No such option"),
    ],
)
def test_a_mistake_is_a_sentence(words, said):
    given, result = call(*words.split(), code=2)
    assert given is None and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvist: ") and said in line


def test_help_shows_names_defaults_and_bounds():
    said = " ".join(call("--help")[1].stdout.split())
    for words in (
        "NAME <str> A name. [required]",
        "-o, --out <path> A file. [required]",
        "Repeatable. [default: a, b]",
        "--context <str> Tokens. [default: 32K]",
        "--seqlen <str> Tokens. [default: all]",
        "--floor / --no-floor Measured. [default: floor]",
        "--old / --new As it was.",
        "--two-words A switch.",
        "[x>=1]",
    ):
        assert words in said


def leaves(group):
    for each in group.commands.values():
        yield from leaves(each) if hasattr(each, "commands") else [each]


@pytest.mark.parametrize("verb", [each for each in leaves(get_command(app)) if each.name != "lm-eval"], ids=str)
def test_no_flag_is_named_twice(verb):
    """Neither in a command's groups nor beside them: all parameters come from dataclasses."""
    groups = get_type_hints(inspect.unwrap(verb.callback))
    known = [each.name for name, group in groups.items() if name != "return" for each in fields(group)]
    assert sorted(known) == sorted(each.name for each in verb.params if each.name != "help")
    options = [option for each in verb.params for option in (*each.opts, *each.secondary_opts)]
    assert len(set(options)) == len(options)


def test_options_of_tasks_that_share_a_name_are_the_same():
    """`kvist eval` has a flag for all that more than one task can be told."""
    shared = {each.name: each for each in fields(Settings)}
    for kind in kinds().values():
        for each in fields(kind.options):
            if "flag" in each.metadata:
                assert (shared[each.name].default, shared[each.name].metadata) == (each.default, each.metadata)
            else:
                assert each.name not in shared


def test_what_is_fitted_has_the_choices_of_an_artefact():
    hints = get_type_hints(Chosen)
    for each in fields(Chosen):
        known = Fitting.model_fields[each.name]
        if each.name != "sinks":
            assert get_args(hints[each.name]) == get_args(known.annotation) and each.default == known.default
