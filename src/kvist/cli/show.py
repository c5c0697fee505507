"""What the console prints, and where: results on stdout, everything else on stderr."""

import json as json_
from dataclasses import dataclass

from kvist.flags import flag


def console(stderr: bool = False):
    """A rich console that leaves brackets alone."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Printed:
    """How results are printed."""

    json: bool = flag(False, "Print JSON, and nothing else, on stdout.")

    def say(self, data, *shown) -> None:
        """The data as JSON; or else texts and tables."""
        if self.json:
            print(json_.dumps(data, indent=2, ensure_ascii=False))
        else:
            for each in shown:
                print(each) if isinstance(each, str) else put(each)

    def warn(self, *sentences: str) -> None:
        """What one should know beside the results, on stderr; JSON holds it."""
        for each in () if self.json else sentences:
            console(stderr=True).print(each)


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
