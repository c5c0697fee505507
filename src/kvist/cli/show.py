"""What the console prints, and where: results on stdout, everything else on stderr."""

import json as json_
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Method = Annotated[
    str,
    typer.Option(
        "--method", "-m", help="'kivi:2', 'kivi k=2 v=4 group=32', or a recipe's JSON file.", show_default=True
    ),
]


def console(stderr: bool = False):
    """A rich console that leaves brackets alone."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def dump(data) -> None:
    """JSON on stdout."""
    print(json_.dumps(data, indent=2, ensure_ascii=False))


def table(title: str, *columns: str, caption: str | None = None, left: int = 1):
    """A rich table; the first `left` columns hold words, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(title, "bold"),
        caption=caption and Text(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
    )
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return made


def put(made) -> None:
    """Print a table on stdout: as wide as it needs where there is no terminal to fit it into."""
    from rich.console import Console

    out = Console(highlight=False, markup=False)
    Console(highlight=False, markup=False, width=None if out.is_terminal else 140).print(made)


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
