"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079). Keys are coded before their rotary embedding, channel by
channel, with ranges known beforehand; values token by token. Both use a ladder fitted to what matters for the loss,
a few entries per token escape it, and the first tokens stay exact. What is fitted comes in an artefact."""

from pathlib import Path

from kvist.allocation import rules
from kvist.artifact import Artifact, Fit, Settings
from kvist.coding import Codec, Fixed, Grouping, Identity, MinMax, NoOutliers, Slots, Table, Unrotate
from kvist.coding.outliers import Outliers
from kvist.methods.parts import Width
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate, Retention, Sliding

TOKEN = Grouping(along="channels", across_heads=True)  # values, and keys per token: one range for all heads
HEAD = Grouping(along="channels")
SHARED = ("outliers", "cap", "sinks", "keys", "key_axis")  # what artefacts of one recipe must have in common
OF_MODEL = ("kind", "layers", "heads", "key_dim", "value_dim", "config")


@method("KVQuant, arXiv 2401.18079")
def kvquant(
    bits: int | None = None,
    k: Width = None,
    v: Width = None,
    artifact: str = "",
    outliers: str = "",
    sinks: int | None = None,
    recent: int = 0,
    keys: str = "",
) -> Recipe:
    """Fitted non-uniform levels, keys before RoPE, a few outliers exact. `artifact=DIR` is what `kvist calibrate`
    wrote, and brings bits (3), outliers (1%), sinks (1) and keys (pre-rope) along; `artifact=DIR2,DIR3` are several of
    one model, of which `k` and `v` choose by bits; `recent` more tokens stay exact (0 as published)."""
    k, v = (bits if own is None else own for own in (k, v))
    if not artifact:
        share = parse_share("1%" if outliers == "" else outliers)
        key, value = (
            Settings.model_validate({"bits": 3 if own is None else own, "outliers": share, "keys": keys or "pre-rope"})
            for own in (k, v)
        )
        rotary, rule = Unrotate() if key.keys == "pre-rope" else None, _rule(recent, 1 if sinks is None else sinks)
        blank = Fit(table=Table(bits=key.bits), range=Fixed()), Fit(table=Table(bits=value.bits))
        sides = key_codec(key, blank[0], rotary), value_codec(value, blank[1])
        plan = LayerPlan(key=Side(codec=sides[0], retention=rule), value=Side(codec=sides[1], retention=rule))
        return Recipe(name="kvquant", paper=kvquant.paper, layers=(plan,))
    found = _artifacts(artifact)
    settings = next(iter(found.values())).settings
    if outliers != "" and abs(parse_share(outliers) - settings.outliers) > 1e-9:
        raise ValueError(f"{artifact} was fitted for {settings.outliers:.2%} outliers; leave outliers= out")
    if keys not in ("", settings.keys):
        raise ValueError(f"{artifact} was fitted for keys {settings.keys}, found keys={keys}; leave it out")
    key, value = (_of_width(found, own, side, artifact) for side, own in (("k", k), ("v", v)))
    return recipe(key, recent, sinks, value)


def recipe(fitted: Artifact, recent: int = 0, sinks: int | None = None, values: Artifact | None = None) -> Recipe:
    """The recipe of an artefact: a plan for each layer. `values`: another artefact of the model, for them."""
    settings, others = fitted.settings, values or fitted
    rule = _rule(recent, settings.sinks if sinks is None else sinks)
    layers = []
    for key, value in zip(fitted.keys, others.values, strict=True):
        keys = Side(codec=key_codec(settings, key, fitted.rotary), retention=rule)
        layers.append(LayerPlan(key=keys, value=Side(codec=value_codec(others.settings, value), retention=rule)))
    return Recipe(name="kvquant", paper=kvquant.paper, layers=tuple(layers), model=fitted.model)


def _artifacts(places: str) -> dict[int, Artifact]:
    """The artefacts in comma-separated places, by bits. They may differ in their levels alone."""
    names = [places] if Path(places).exists() else str(places).split(",")
    found: dict[int, Artifact] = {}
    for name, fitted in ((name, Artifact.find(name)) for name in names):
        first = next(iter(found.values()), fitted)
        pairs = {"rotary": (first.rotary, fitted.rotary)}
        pairs |= {f"model ({x})": (getattr(first.model, x), getattr(fitted.model, x)) for x in OF_MODEL}
        pairs |= {x: (getattr(first.settings, x), getattr(fitted.settings, x)) for x in SHARED}
        for what, (one, other) in pairs.items():
            if one != other:
                words = "" if what == "rotary" else f", {one} and {other}"
                raise ValueError(f"{names[0]} and {name} differ in {what}{words}; give artefacts of one calibration")
        if fitted.settings.bits in found:
            raise ValueError(f"several artefacts of {fitted.settings.bits} bits among {places}; give one of them")
        found[fitted.settings.bits] = fitted
    return found


def _of_width(found: dict[int, Artifact], bits: Width, side: str, places: str) -> Artifact:
    have = ", ".join(map(str, found))
    if bits is None and len(found) > 1:
        raise ValueError(f"{places} are fitted for {have} bits; choose by bits=, k= and v=, or an allocation")
    if bits is not None and bits not in found:
        raise ValueError(f"{places} was fitted for {have} bits, found {side}={bits}; calibrate for {bits} bits as well")
    return found[bits or next(iter(found))]


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
        share = rules.parse_share(text)
    except ValueError:
        share = 1.0
    if share >= 0.5:
        raise ValueError(f"outliers must be a share of the channels such as 1% or 0.01, below half, found {text!r}")
    return share


def _slots(share: float) -> Outliers:
    return Slots(share=share) if share else NoOutliers()


def _rule(recent: int, sinks: int) -> Retention:
    return Sliding(size=recent, sinks=sinks) if recent else Immediate(sinks=sinks)
