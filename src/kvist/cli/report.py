"""`kvist report`: what `kvist eval` measured, as a page, a table and a picture."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Json, dump

PAGE, TABLE, PICTURE = "report.html", "report.md", "pareto.png"
NEEDED = "kvist report needs matplotlib, adjustText and jinja2: pip install 'kvist[report]'"


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with results of `kvist eval --out`.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder to write into.  [default: that of the results]")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The method others are compared with.  [default: the first that is not exact]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of intervals and tests.")] = 0,
    json: Json = False,
) -> None:
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
    target = _target(folder, out)

    from kvist.atomic import replacing, writable
    from kvist.report import canvas, figures, page, study
    from kvist.report.sentences import verdict

    writable(target / PAGE, target / TABLE, target / PICTURE)
    found = study.read(folder, baseline, seed)
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
    if json:
        return dump(_data(found, sentences, written))
    print(*sentences, "", *(f"wrote {path}" for path in written), sep="\n")
    return None


def _target(folder: Path, out: Path | None) -> Path:
    if out is None:
        return folder if folder.is_dir() else folder.parent
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is a folder, found a file at {out}")
    if not out.parent.is_dir():
        raise ValueError(f"expected a folder to make {out.name} in, found none at {out.parent}")
    out.mkdir(exist_ok=True)
    return out


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
