"""The page: one file that needs nothing else."""

import json
from importlib.resources import files
from pathlib import Path

from kvist import __version__
from kvist.atomic import replacing
from kvist.report.figures import Figure, figures
from kvist.report.load import Group
from kvist.report.provenance import behind, recipes
from kvist.report.study import Study
from kvist.report.tables import Table, main, others, scores, uneven
from kvist.report.verdict import notes, verdict

SECTIONS = {
    "pareto": ("Quality against stored bits", ""),
    "tables": (
        "The numbers",
        "By rising bits; ● marks what nothing cheaper matches. ▼ and ▲: the paired difference is real at 5 %, "
        "Holm-corrected over its column; =: not shown to differ. Point at a mark for the difference, its interval and "
        "p.",
    ),
    "maps": ("Finding a fact", "Maps of right answers, the best above."),
    "scores": ("Answers", "Each against the exact cache, on the same items: ▼ really below, = not shown to differ."),
    "position": ("Divergence by position, keys and values", ""),
    "horizon": ("Divergence by horizon", "Text is decoded step by step; history is quantized as it is produced."),
    "others": ("Measured in other ways", "Other texts or modes: numbers that are not to be mixed with those above."),
    "speed": ("Memory and speed", ""),
    "nuisance": ("What should change nothing", ""),
    "gates": ("Are the ports faithful?", "Checks that come before any comparison."),
}
STATISTICS = (
    "Intervals are 95 % bootstrap intervals over items (windows or questions), 4,000 draws. Differences are paired, "
    "on the items that all methods have: answers that are right or wrong by McNemar's exact test, all other numbers by "
    "flipping signs of the differences (all flips of up to 14 items, 20,000 draws of more). Holm's correction is over "
    "a column of a table, or of a figure. “=” says that no difference was shown, not that there is none. A slope is of "
    "least squares behind the first four points of a curve. Where texts part is counted up to the tokens written."
)


def render(study: Study) -> str:
    """HTML with its style, figures and tables inside."""
    from jinja2 import Environment, select_autoescape

    source = files("kvist.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    parts = _parts(study)
    used = sorted({n for _, items in parts for item in items if isinstance(item, Figure | Table) for n in item.groups})
    known = {group.number: group for group in study.groups}
    rest = [group.number for group in study.groups if group.number not in used]
    return template.from_string(source).render(
        title=", ".join(dict.fromkeys(place.name for place in study.places)),
        verdict=verdict(study),
        sections=[(name, *SECTIONS[name], items) for name, items in parts],
        behind=[behind(study, known[number]) for number in [*used, *rest]],
        titles={number: f"{study.titles[number]}: {group.place}" for number, group in known.items()},
        recipes=[each | {"json": json.dumps(each["recipe"], indent=1, ensure_ascii=False)} for each in recipes(study)],
        models=_models(study.groups),
        baseline=study.baseline,
        statistics=STATISTICS,
        seed=study.seed,
        version=__version__,
        gates=study.gates,
        kinds={Figure: "figure", Table: "table"},
    )


def write(text: str, path: str | Path) -> None:
    """The page as a file, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _parts(study: Study) -> list[tuple[str, list]]:
    """Sections that have something to show, with their figures, tables and sentences in order."""
    found: dict[str, list] = {name: [] for name in SECTIONS}
    for figure in figures(study):
        found[figure.section].append(figure)
    for place in study.places:
        if table := main(study, place):
            found["tables"] += [table, *notes(study, place)]
        if table := scores(study, place):
            found["scores"].append(table)
        if table := uneven(study, place):
            found["position"].append(table)
        found["others"] += others(study, place)
    found["gates"] = list(study.gates)
    return [(name, items) for name, items in found.items() if items]


def _models(groups: list[Group]) -> list[str]:
    return list(dict.fromkeys(f"{group.place.model} ({group.place.dtype})" for group in groups))
