"""What is written: a page that needs nothing else, and its tables as Markdown, from one set of parts."""

import json
from importlib.resources import files
from typing import Any

from kvist import __version__
from kvist.bench.reports import Gates
from kvist.evaluate.measures import Section
from kvist.evaluate.registry import kind_of, sections
from kvist.report.figures import PARETO, SPEED, Figure, figures
from kvist.report.study import Study
from kvist.report.tables import Table, apart, behind, main, others, recipes, scores
from kvist.report.verdict import notes, verdict

READ = (
    "▼ and ▲: the paired difference is real at 5 %, Holm-corrected over its column; =: not shown to differ. ●: nothing "
    "cheaper is as good."
)
TABLES = Section(
    "tables", "The numbers", f"By rising bits. {READ} Point at a mark for the difference, its interval and p."
)
SCORES = Section(
    "scores", "Answers", "Each against the exact cache, on the same items: ▼ really below, = not shown to differ."
)
OTHERS = Section("others", "Measured in other ways", "Other tasks, texts or modes: not to be mixed with those above.")
GATES = Section("gates", "Are the ports faithful?", "Checks that come before any comparison.")
STATISTICS = (
    "Intervals are 95 % bootstrap intervals over items (windows or questions), 4,000 draws. Differences are paired, "
    "on the items that all methods have: answers that are right or wrong by McNemar's exact test, all other numbers by "
    "flipping signs of the differences (all flips of up to 14 items, 20,000 draws of more). Holm's correction is over "
    "a column of a table, or of a figure. “=” says that no difference was shown, not that there is none. A slope is of "
    "least squares behind the first four points of a curve. Where texts part is counted up to the tokens written."
)
Part = Figure | Table | str


def page(study: Study) -> str:
    """HTML with its style, figures and tables inside."""
    every = _parts(study)
    used = {
        n: None for items in every.values() for item in items if isinstance(item, Figure | Table) for n in item.groups
    }
    known = {group.number: group for group in study.groups}
    return _rendered(
        "page.html",
        study,
        title=", ".join(dict.fromkeys(place.name for place in study.places)),
        sections=[(*section, items) for section, items in every.items()],
        behind=[behind(study, known[number]) for number in used | dict.fromkeys(known)],
        titles={number: f"{study.titles[number]}: {group.place}" for number, group in known.items()},
        recipes=[each | {"json": json.dumps(each["recipe"], indent=1, ensure_ascii=False)} for each in recipes(study)],
        models=list(dict.fromkeys(f"{group.place.model} ({group.place.dtype})" for group in study.groups)),
        statistics=STATISTICS,
        version=__version__,
        gates=_gates(study),
    )


def markdown(study: Study, picture: str | None = None) -> str:
    """Sentences, the picture where there is one, and the tables of each place."""
    places = [(place, [main(study, place), scores(study, place)], others(study, place)) for place in study.places]
    told = [(place, list(filter(None, first)), notes(study, place), more) for place, first, more in places]
    return _rendered("page.md", study, picture=picture, places=told, read=READ)


def _rendered(name: str, study: Study, **parts: Any) -> str:
    from jinja2 import Environment, select_autoescape

    source = files("kvist.report").joinpath(name).read_text(encoding="utf-8")
    escaped = select_autoescape(("html",), default_for_string=name.endswith("html"))
    template = Environment(autoescape=escaped, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    told = {"verdict": verdict(study), "baseline": study.baseline, "seed": study.seed}
    return template.from_string(source).render(told | parts)


def _gates(study: Study) -> list:
    return [gate for _, report in study.benches if isinstance(report, Gates) for gate in report.rows]


def _parts(study: Study) -> dict[Section, list[Part]]:
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
    found[GATES] = _gates(study)
    return {section: items for section, items in found.items() if items}
