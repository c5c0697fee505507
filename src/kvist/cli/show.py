"""What the console prints, and where: results on stdout, everything else on stderr."""

import json as json_
from pathlib import Path
from typing import Annotated

import typer

MODEL = "A model's folder, GGUF file or name on the Hugging Face Hub, or smollm2."
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
    Console(highlight=False, markup=False, width=None if out.is_terminal else 160).print(made)


class Bars:
    """A progress bar per stage, on stderr."""

    def __enter__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # steps may take minutes: the time left is told from those of the last hour, not of the last 30 seconds
        self.progress = Progress(*columns, console=console(stderr=True), speed_estimate_period=3600)
        self.tasks = {}
        self.progress.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)

    def show(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total)
        self.progress.update(self.tasks[stage], completed=done)


def check_plot(path: Path | None) -> None:
    """Before the hours, not after: can a plot be drawn there?"""
    if path is None:
        return
    if path.suffix != ".png":
        raise ValueError(f"a plot is a PNG file, found --plot {path}; give a name that ends in .png")
    if not path.parent.is_dir():
        raise ValueError(f"expected a folder to write {path.name} into, found none at {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install 'kvist[plot]'") from None


def parse_choices(text: str | None) -> tuple[int, ...] | None:
    """Widths from --choices '2,3,4', ascending; None stays."""
    try:
        return None if text is None else tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise ValueError(f"--choices is a list of widths such as 2,3,4, found {text!r}") from None
