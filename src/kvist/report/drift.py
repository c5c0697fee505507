"""What accumulates while a text is written: does divergence grow with each step, and is it more than at once?"""

from collections.abc import Callable

from kvist.evaluate.results import Cell
from kvist.evaluate.statistics import Estimate, mean
from kvist.evaluate.summary import slopes
from kvist.report.contrast import Contrast, Pair, judged
from kvist.report.load import EXACT, Group

STREAMED, AT_ONCE = "streamed", "at once"


def growing(group: Group, seed: int) -> dict[str, Contrast]:
    """By method, the growth of its divergence per 1,000 steps, against none; "worse" where it really grows."""
    known = {entry.method: slopes(entry.cell.values) for entry in group.whole.methods if entry.method != EXACT}
    pairs = [Pair(method, "none", each, [0.0] * len(each)) for method, each in known.items() if each]
    return judged(pairs, "slope", seed)


def accumulated(group: Group, seed: int) -> dict[str, Contrast]:
    """By method, divergence with history quantized as it was produced against the same quantized at once, at the last
    step where both are known; "worse" where errors really accumulate."""
    known = {entry.method: entry.cell for entry in group.whole.methods if entry.method != EXACT and probed(entry.cell)}
    pairs = [Pair(method, AT_ONCE, *(each(cell) for each in (_last(1), _last(2)))) for method, cell in known.items()]
    return judged(pairs, "kl", seed)


def ends(cell: Cell, seed: int) -> dict[str, Estimate]:
    """Both divergences there."""
    return {name: mean(_last(which)(cell), seed) for name, which in ((STREAMED, 1), (AT_ONCE, 2))}


def probed(cell: Cell) -> bool:
    """Whether its history was also quantized at once."""
    return all(cell.values.get("kl_at_once", [[]]))


def last_step(cell: Cell) -> int:
    """Decoded tokens after which that was."""
    return cell.values["kl_at_once"][0][-1][0]


def _last(which: int) -> Callable[[Cell], list[float]]:
    return lambda cell: [float(each[-1][which]) for each in cell.values["kl_at_once"]]
