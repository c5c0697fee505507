"""The report's tables as Markdown."""

from kvist.report.study import Study
from kvist.report.tables import Field, Table, main, others, scores
from kvist.report.verdict import notes, verdict

READ = (
    "Intervals: 95 % bootstrap over items. ▼ and ▲: the paired difference is real at 5 %, Holm-corrected over its "
    "column; =: not shown to differ. ●: nothing cheaper is as good."
)


def markdown(study: Study, picture: str | None = None) -> str:
    """Sentences, the picture where there is one, and the tables of each place."""
    parts = ["# kvist report", *verdict(study)]
    if picture:
        parts.append(f"![Quality against stored bits]({picture})")
    parts.append(READ + f" Methods are compared with `{study.baseline}`.")
    for place in study.places:
        parts.append(f"## {place}")
        for made in (main(study, place), scores(study, place)):
            if made:
                parts.append(table(made))
                parts.append(made.caption.strip())
        parts += notes(study, place)
        for made in others(study, place):
            parts += [f"### {made.title}", table(made), made.caption]
    return "\n\n".join(parts) + "\n"


def table(made: Table) -> str:
    """One table; columns of pictures are left out."""
    kept = [i for i, (name, _) in enumerate(made.columns) if name]
    head = "| " + " | ".join(_safe(made.columns[i][0]) for i in kept) + " |"
    rule = "| " + " | ".join(":--" if i == 0 else "--:" for i in kept) + " |"
    rows = ["| " + " | ".join(_cell(row[i], i == 0) for i in kept) + " |" for row in made.rows]
    return "\n".join([head, rule, *rows])


def _cell(field: Field, first: bool) -> str:
    if first:
        return f"`{_safe(field.text)}`" + (" ●" if field.verdict == "frontier" else "")
    return _safe(" ".join(part for part in (field.text, field.small) if part))


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
