"""Figures of what `kvist bench decode` and `kvist bench throughput` measured."""

from collections.abc import Iterator, Sequence

from kvist.evaluate.statistics import Estimate
from kvist.report import canvas, dots

COLUMNS = 4  # at most


def figures(benches: Sequence[tuple[str, dict]]) -> Iterator[tuple[str, str, str, str, str]]:
    """id, title, SVG, caption and file of each."""
    for i, (file, report) in enumerate(benches, 1):
        rows = [row for row in report["rows"] if "contender" in row]
        if any("median ms" in row for row in rows):
            columns = _columns(rows, "tokens", "{:,} tokens", "median ms", ("p10 ms", "p90 ms"))
            unit, said = "ms per decode step (whiskers: 10 % and 90 % of the steps)", "Median of the steps."
        else:
            columns = _columns(rows, "batch", "batch {}", "tokens/s", None)
            unit, said = "generated tokens/s, prefill included", "One run each, no interval."
        first = {name: next(iter(each.values())).value for name, each in columns[-1].values.items()}
        methods = sorted(
            dict.fromkeys(name for each in columns for name in each.values), key=lambda name: first.get(name, 1e9)
        )
        if "tokens/s" in unit:
            methods.reverse()
        figure = dots.draw(methods, columns, (dots.Kind("value"),), unit, log=unit.startswith("ms"))
        with canvas.style():
            body = canvas.svg(figure)
        title = str(report.get("title", file))
        caption = f"{title.rstrip('.')}. {said} {_machine(report.get('machine', {}))}"
        yield f"bench-{i}", title.partition(":")[0], body, caption, file


def _columns(rows: Sequence[dict], by: str, words: str, name: str, ends: tuple[str, str] | None) -> list[dots.Column]:
    """A column per size: all of them, or some from the smallest to the largest."""
    known = [row for row in rows if row.get(name)]
    sizes = sorted({row[by] for row in known})
    if len(sizes) > COLUMNS:
        sizes = [sizes[round(i * (len(sizes) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
    return [
        dots.Column(
            words.format(size),
            {
                row["contender"].removeprefix("kvist "): {
                    "value": Estimate(row[name], *((row.get(end) for end in ends) if ends else (None, None)))
                }
                for row in known
                if row[by] == size
            },
        )
        for size in sizes
    ]


def _machine(facts: dict) -> str:
    known = (f"{name} {value}" if name != "processor" else str(value) for name, value in facts.items())
    return ", ".join(known) + "." if facts else ""
