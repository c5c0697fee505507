"""LogQuant (Chen et al. 2025, arXiv 2503.19950) and its relatives. Attention to a token fades with distance, so the
tokens kept exact thin out with distance: a log-spaced set of W and a recent window of W to 2W-1. `streaming` spends the
same room on sinks and a window; the `partial-` forms spend it on keys alone. Keys are grouped along tokens and values
along channels as in KIVI; the published code groups both along channels.

`budget` R is the published conversion of one full-precision budget into the window of each form."""

from kvist.methods.parts import Width, check_group, per_channel, per_token, width
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Block, Gather, LogSparse, Retention, Streaming

PAPER = "LogQuant, arXiv 2503.19950"
SINKS = 4


@method(PAPER)
def logquant(
    bits: int = 2,
    k: Width = None,
    v: Width = None,
    group: int = 32,
    window: int = 64,
    sinks: int = 0,
    budget: int = 0,
) -> Recipe:
    """Low bits for all, and exact: W log-spaced old tokens and the newest W to 2W-1."""
    rule = LogSparse(window=budget // 3 if budget else window, sinks=sinks)
    return _recipe("logquant", bits, k, v, group, rule, rule)


@method(PAPER)
def partial_logquant(
    bits: int = 2,
    k: Width = None,
    v: Width = None,
    group: int = 32,
    window: int = 64,
    sinks: int = 0,
    budget: int = 0,
) -> Recipe:
    """`logquant` for keys; values keep only an unfinished block of up to W-1."""
    size = budget // 2 if budget else window
    return _recipe(
        "partial-logquant", bits, k, v, group, LogSparse(window=size, sinks=sinks), Block(size=size, sinks=sinks)
    )


@method(PAPER)
def streaming(
    bits: int = 2,
    k: Width = None,
    v: Width = None,
    group: int = 32,
    window: int = 64,
    sinks: int = SINKS,
    budget: int = 0,
) -> Recipe:
    """Low bits for all but S first tokens and the newest W to 2W-1."""
    rule = Streaming(window=(budget - sinks) // 2 if budget else window, sinks=sinks)
    return _recipe("streaming", bits, k, v, group, rule, rule)


@method(PAPER)
def partial_streaming(
    bits: int = 2,
    k: Width = None,
    v: Width = None,
    group: int = 32,
    window: int = 64,
    sinks: int = SINKS,
    budget: int = 0,
) -> Recipe:
    """`streaming` for keys; values keep S first tokens and an unfinished block of up to W-1."""
    size = int((budget - sinks) / 1.5) if budget else window
    return _recipe(
        "partial-streaming", bits, k, v, group, Streaming(window=size, sinks=sinks), Gather(size=size, sinks=sinks)
    )


def _recipe(
    name: str, bits: int, k: Width, v: Width, group: int, keys: LogSparse | Streaming, values: Retention
) -> Recipe:
    check_group(group, keys.window)
    for given in (width(k, bits), width(v, bits)):
        if given not in (2, 4, 16):
            raise ValueError(f"bits must be 2 or 4 (or 16, exact), found {given}")
    plan = LayerPlan(
        key=Side(codec=per_channel(width(k, bits), group), retention=keys),
        value=Side(codec=per_token(width(v, bits), group), retention=values),
    )
    return Recipe(name=name, paper=PAPER, layers=(plan,))
