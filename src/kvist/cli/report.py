"""`kvist report`: what `kvist eval` measured, as a page, a table and a picture."""

from dataclasses import dataclass
from pathlib import Path

from kvist.cli import files
from kvist.cli.options import command
from kvist.cli.show import Printed
from kvist.flags import argument, flag

PAGE, TABLE, PICTURE = "report.html", "report.md", "pareto.png"
NEEDED = "kvist report needs matplotlib, adjustText and jinja2: pip install 'kvist[report]'"


@dataclass(frozen=True)
class Drawn:
    """What is drawn, where, and compared with which method."""

    folder: Path = argument(..., "A folder with results of `kvist eval --out`.", metavar="DIR")
    out: Path | None = flag(None, "A folder to write into.  [default: that of the results]", "-o")
    baseline: str | None = flag(None, "The method others are compared with.  [default: the first that is not exact]")
    seed: int = flag(0, "Of intervals and tests.")


@command
def report(drawn: Drawn, printed: Printed) -> None:
    """Draw what was measured: report.html, which needs nothing else, report.md, and pareto.png.

    All files .jsonl and .jsonl.xz in DIR are read, and JSON of `kvist bench decode --out` and `kvist bench throughput
    --out` beside them. Every number has a 95 % interval; tests are paired and corrected for their number. Example:
    kvist report results --baseline kivi:2
    """
    try:
        import adjustText  # noqa: F401
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(NEEDED) from None
    if drawn.out is None:
        target = drawn.folder if drawn.folder.is_dir() else drawn.folder.parent
    else:
        target = files.folder(drawn.out)

    from kvist.atomic import replacing, writable
    from kvist.report import canvas, figures, page, study
    from kvist.report.sentences import verdict

    writable(target / PAGE, target / TABLE, target / PICTURE)
    found = study.read(drawn.folder, drawn.baseline, drawn.seed)
    picture, _ = figures.frontier(found, found.models[0])
    texts = {PAGE: page.page(found), TABLE: page.markdown(found, PICTURE if picture else None)}
    for name, text in texts.items():
        with replacing(target / name) as scratch:
            scratch.write_text(text, encoding="utf-8")
    written = [target / name for name in texts]
    if picture:
        canvas.png(picture, target / PICTURE)
        written.append(target / PICTURE)
    sentences = verdict(found)
    printed.say(_data(found, sentences, written), *sentences, "", *(f"wrote {path}" for path in written))


def _data(found, sentences: list[str], written: list[Path]) -> dict:
    """The verdict, the files, and each place's methods with their statistics and contrasts."""
    from kvist.evaluate.statistics import Estimate

    def plain(line) -> dict:
        known = {
            name: value._asdict() if isinstance(value, Estimate) else value for name, value in line.statistics.items()
        }
        against = {name: getattr(line, name) for name in ("baseline", "cheaper")}
        told = {
            name: {**each._asdict(), "difference": each.difference._asdict()} for name, each in against.items() if each
        }
        return {"method": line.method, "bits": line.bits, "frontier": line.frontier, "statistics": known} | told

    tasks = [
        {
            **group.place._asdict(),
            "task": group.task,
            "settings": group.settings,
            "methods": [plain(line) for line in found.lines(group).values()],
        }
        for group in found.groups
    ]
    return {
        "verdict": sentences,
        "baseline": found.baseline,
        "seed": found.seed,
        "written": [str(path) for path in written],
        "tasks": tasks,
    }
