"""What is written: a page that needs nothing else, and its tables as Markdown, from one set of parts."""

import json
from importlib.resources import files
from typing import Any

from kvist import __version__
from kvist.bench.reports import Gates
from kvist.evaluate.measures import Section
from kvist.evaluate.registry import kind_of, sections
from kvist.report.figures import PARETO, SPEED, Figure, figures
from kvist.report.look import look, number
from kvist.report.sentences import notes, verdict
from kvist.report.study import Study
from kvist.report.tables import Table, apart, main, others, scores

TABLES, SCORES = Section("tables", "The numbers"), Section("scores", "Answers")
OTHERS, GATES = Section("others", "Measured in other ways"), Section("gates", "Are the ports faithful?")


def page(study: Study) -> str:
    """HTML with its style, figures and tables inside."""
    return _rendered(
        "page.html",
        study,
        title=", ".join(dict.fromkeys(place.name for place in study.places)),
        sections=[(*section, items) for section, items in _parts(study).items()],
        groups=study.groups,
        titles={group.number: f"{study.titles[group.number]}: {group.place}" for group in study.groups},
        recipes={entry.cell.first.digest: entry for group in study.groups[::-1] for entry in group.entries[::-1]},
        models=list(dict.fromkeys(f"{group.place.model} ({group.place.dtype})" for group in study.groups)),
        version=__version__,
        json=json.dumps,
        look=look,
        number=number,
        anchor=anchor,
    )


def markdown(study: Study, picture: str | None = None) -> str:
    """Sentences, the picture where there is one, and the tables of each place."""
    places = [(place, [main(study, place), scores(study, place)], others(study, place)) for place in study.places]
    told = [(place, list(filter(None, first)), notes(study, place), more) for place, first, more in places]
    return _rendered("page.md", study, picture=picture, places=told)


def _rendered(name: str, study: Study, **parts: Any) -> str:
    from jinja2 import Environment, select_autoescape

    source = files("kvist.report").joinpath(name).read_text(encoding="utf-8")
    escaped = select_autoescape(("html",), default_for_string=name.endswith("html"))
    template = Environment(autoescape=escaped, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    told = {"verdict": verdict(study), "baseline": study.baseline, "seed": study.seed}
    return template.from_string(source).render(told | parts)


def anchor(digest: str) -> str:
    """Of a recipe."""
    return "recipe-" + "".join(c if c.isalnum() else "-" for c in digest)


def _parts(study: Study) -> dict[Section, list[Figure | Table | str]]:
    """Sections that have something to show, with their figures, tables and sentences in order."""
    found: dict[Section, list] = {each: [] for each in (PARETO, TABLES, SCORES, *sections(), OTHERS, SPEED, GATES)}
    for figure in figures(study):
        found[figure.section].append(figure)
    for place in study.places:
        if table := main(study, place):
            found[TABLES] += [table, *notes(study, place)]
        if table := scores(study, place):
            found[SCORES].append(table)
        for group in study.fullest(place):
            if (table := apart(study, group)) and (section := kind_of(group.task).section):
                found[section].append(table)
        found[OTHERS] += others(study, place)
    found[GATES] = [gate for _, report in study.benches if isinstance(report, Gates) for gate in report.rows]
    return {section: items for section, items in found.items() if items}
