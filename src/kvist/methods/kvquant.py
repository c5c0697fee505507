"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079). Keys are coded before their rotary embedding, channel by
channel, with ranges known beforehand; values token by token. Both use a ladder fitted to what matters for the loss,
a few entries per token escape it, and the first tokens stay exact. What is fitted comes in an artefact."""

from kvist.artifact import Artifact, Fit, Settings
from kvist.coding import Codec, Fixed, Grouping, Identity, MinMax, NoOutliers, Slots, Table, Unrotate
from kvist.coding.outliers import Outliers
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate, Retention, Sliding

TOKEN = Grouping(along="channels", across_heads=True)  # values, and keys per token: one range for all heads
HEAD = Grouping(along="channels")


@method("KVQuant, arXiv 2401.18079")
def kvquant(
    bits: int | None = None,
    artifact: str = "",
    outliers: str = "",
    sinks: int | None = None,
    recent: int = 0,
    keys: str = "",
) -> Recipe:
    """Fitted non-uniform levels, keys before RoPE, a few outliers exact. `artifact=DIR` is what `kvist calibrate`
    wrote, and brings bits (3), outliers (1%), sinks (1) and keys (pre-rope) along; `recent` more tokens stay exact (0
    as published)."""
    if not artifact:
        share = parse_share("1%" if outliers == "" else outliers)
        chosen = {"bits": 3 if bits is None else bits, "outliers": share, "keys": keys or "pre-rope"}
        settings = Settings.model_validate(chosen)
        rule, blank = _rule(recent, 1 if sinks is None else sinks), Fit(table=Table(bits=settings.bits))
        rotary = Unrotate() if settings.keys == "pre-rope" else None
        key = key_codec(settings, Fit(table=blank.table, range=Fixed()), rotary)
        plan = LayerPlan(
            key=Side(codec=key, retention=rule), value=Side(codec=value_codec(settings, blank), retention=rule)
        )
        return Recipe(name="kvquant", paper=kvquant.paper, layers=(plan,))
    fitted = Artifact.find(artifact)
    if bits not in (None, fitted.settings.bits):
        raise ValueError(f"{artifact} was fitted for {fitted.settings.bits} bits, found bits={bits}; leave it out")
    if outliers != "" and abs(parse_share(outliers) - fitted.settings.outliers) > 1e-9:
        raise ValueError(f"{artifact} was fitted for {fitted.settings.outliers:.2%} outliers; leave outliers= out")
    if keys not in ("", fitted.settings.keys):
        raise ValueError(f"{artifact} was fitted for keys {fitted.settings.keys}, found keys={keys}; leave it out")
    return recipe(fitted, recent, sinks)


def recipe(fitted: Artifact, recent: int = 0, sinks: int | None = None) -> Recipe:
    """The recipe of an artefact: a plan for each layer."""
    settings = fitted.settings
    rule = _rule(recent, settings.sinks if sinks is None else sinks)
    layers = []
    for key, value in zip(fitted.keys, fitted.values, strict=True):
        keys = Side(codec=key_codec(settings, key, fitted.rotary), retention=rule)
        layers.append(LayerPlan(key=keys, value=Side(codec=value_codec(settings, value), retention=rule)))
    return Recipe(name="kvquant", paper=kvquant.paper, layers=tuple(layers), model=fitted.model)


def key_codec(settings: Settings, fit: Fit, rotary: Unrotate | None) -> Codec:
    """How keys are stored. Where thresholds alone say what escapes, tokens have what most of them need, for the
    largest."""
    pooled = Slots(slots=settings.slots, rank="largest") if settings.slots else NoOutliers()
    return Codec(
        levels=fit.table,
        grouping=HEAD if fit.range else TOKEN,
        range=fit.range or MinMax(),
        outliers=pooled if settings.cap == "none" and fit.range else _slots(settings.outliers),
        transform=rotary or Identity(),
    )


def value_codec(settings: Settings, fit: Fit) -> Codec:
    """How values are stored."""
    return Codec(levels=fit.table, grouping=TOKEN, outliers=_slots(settings.outliers))


def parse_share(text: str | float) -> float:
    """A share of the channels from "1%" or 0.01."""
    try:
        share = float(text.rstrip("%")) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 0.5:
        raise ValueError(f"outliers must be a share of the channels such as 1% or 0.01, below half, found {text!r}")
    return share


def _slots(share: float) -> Outliers:
    return Slots(share=share) if share else NoOutliers()


def _rule(recent: int, sinks: int) -> Retention:
    return Sliding(size=recent, sinks=sinks) if recent else Immediate(sinks=sinks)
