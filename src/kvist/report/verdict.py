"""What the numbers say, in sentences."""

from kvist.evaluate.registry import kind_of
from kvist.evaluate.statistics import Estimate
from kvist.report.contrast import KL, SCORE
from kvist.report.load import EXACT, Place
from kvist.report.look import number
from kvist.report.study import Study

FEW = 5  # names in a sentence of the header
TOO_FEW = 6  # items: no flip of fewer signs has a p below 5 %


def verdict(study: Study) -> list[str]:
    """Three sentences on all of it: what was compared, who is on the frontier, what outliers and answers change."""
    found = [measured(study), frontier(study, study.places[0], True)]
    found.append(stressed(study) or answered(study, study.places[0]))
    return [sentence for sentence in found if sentence]


def measured(study: Study) -> str:
    """How many methods, where, on what."""
    others = [name for name in study.methods if name != EXACT]
    models = _listed(list(dict.fromkeys(place.name for place in study.places)))
    conditions = _listed(list(dict.fromkeys(place.condition for place in study.places)))
    tasks = _listed(list(dict.fromkeys(group.task for group in study.groups)))
    beside = " beside the exact cache" if EXACT in study.methods else ""
    return f"{_count(len(others), 'method')}{beside}, on {models}, {conditions}: {tasks}."


def frontier(study: Study, place: Place, named: bool = False) -> str:
    """The methods that nothing cheaper matches, and which of these steps are real."""
    rows = [line for line in study.table(place) if line.frontier and line.method != EXACT]
    group = study.divergence(place) or study.recall(place)
    if group is None or not rows:
        return ""
    if study.divergence(place):
        word, said = "KL", [f"KL {number(line.of(KL).value)}" for line in rows]
    else:
        word, said = "answers", [f"{100 * line.of(SCORE).value:.0f} % right" for line in rows]
    steps = [f"{line.method} ({line.bits:.2g} bits, {each})" for line, each in zip(rows, said, strict=True)]
    if named and len(steps) > FEW:
        steps = [f"{len(steps)} methods, from {steps[0]} to {steps[-1]}"]
    tested = [line.cheaper for line in rows if line.cheaper]
    real = sum(each.verdict == "better" for each in tested)
    where = f"On {place}, " if named else ""
    # a first letter alone: names of methods stay as they are
    lead = f"{where}the frontier of {word} against stored bits runs over {_listed(steps)}"
    if not tested:
        end = ""
    elif group.whole.items < TOO_FEW:
        end = f"; {group.whole.items} items are too few to show whether a step is real"
    elif real == len(tested):
        end = "; each step is a real improvement" if len(tested) > 1 else "; the step is a real improvement"
    else:
        end = f"; {real} of its {_count(len(tested), 'step')} {'is a' if real == 1 else 'are'} real improvement"
        end += "" if real == 1 else "s"
    return (lead if named else lead[0].upper() + lead[1:]) + end + "."


def stressed(study: Study) -> str:
    """Which methods planted outliers hurt most and least."""
    for places in study.models:
        plain = next((place for place in places if place.stress == "none"), None)
        strong = next((place for place in reversed(places) if place.stress != "none"), None)
        if plain is None or strong is None or not (study.divergence(plain) and study.divergence(strong)):
            continue
        before, after = ({line.method: line.of(KL).value for line in study.table(each)} for each in (plain, strong))
        ratio = {m: after[m] / before[m] for m in after if before.get(m) and m != EXACT}
        if len(ratio) < 2:
            continue
        most, least = max(ratio, key=lambda m: ratio[m]), min(ratio, key=lambda m: ratio[m])
        return (
            f"With {strong.condition} in {strong.name}, divergence changes most for {most} "
            f"({number(ratio[most])} times) and least for {least} ({number(ratio[least])} times)."
        )
    return ""


def answered(study: Study, place: Place) -> str:
    """The cheapest method whose answers are not shown to be worse than those of the exact cache."""
    group = study.recall(place)
    against = study.against_exact(group) if group else {}
    if group is None or not against:
        return ""
    # an interval that reaches zero, too: correcting for many tests must not make methods equal
    fair = {name for name, each in against.items() if each.verdict != "worse" and (each.difference.high or 0) >= 0}
    good = [line for line in study.lines(group, SCORE) if line.method in fair]
    if not good:
        return f"{study.titles[group.number]}: every method answers really worse than the exact cache."
    first = good[0]
    change = against[first.method].difference
    return (
        f"{study.titles[group.number]}: {first.method} at {first.bits:.2g} bits is the cheapest that is not shown to "
        f"answer worse than the exact cache (difference {points(change)})."
    )


def notes(study: Study, place: Place) -> list[str]:
    """Sentences of one place: its frontier, its answers, what accumulates."""
    found = [frontier(study, place), answered(study, place)]
    for group in study.fullest(place):
        for told in kind_of(group.task).statistics.values():
            grows = study.above_nothing(group, told.null) if told.null and study.lines(group) else {}
            real = [
                line.method
                for line in study.table(place)
                if line.method in grows and grows[line.method].verdict == "worse"
            ]
            words = _listed(real) if 0 < len(real) <= 6 else f"{len(real)} of {len(grows)} methods"
            if grows:
                found.append(f"Divergence really grows with each decode step for {words if real else 'none'}.")
    return [sentence for sentence in found if sentence]


def points(change: Estimate) -> str:
    """A difference of shares, in percentage points."""
    ends = "" if change.low is None else f" [{100 * change.low:+.1f}, {100 * (change.high or 0):+.1f}]"
    return f"{100 * change.value:+.1f}{ends} points".replace("-", "−")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "nothing"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")
