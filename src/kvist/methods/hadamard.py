"""QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), for the cache: rotate each head by a Hadamard matrix, so that
outlier channels spread over all channels, then round per token. The rotation is undone on the query and the output."""

from kvist.coding import Hadamard
from kvist.methods.parts import Width, per_token, width
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate, Sliding


@method("QuaRot, arXiv 2404.00456")
def hadamard(bits: int = 4, k: Width = None, v: Width = None, group: int = 0, recent: int = 0) -> Recipe:
    """Per-token integers in a rotated space, per head; one range per token and head, or per `group` channels."""
    retention = Sliding(size=recent) if recent else Immediate()
    key, value = (_side(width(given, bits), group, retention) for given in (k, v))
    return Recipe(name="hadamard", paper=hadamard.paper, layers=(LayerPlan(key=key, value=value),))


def _side(bits: int, group: int, retention) -> Side:
    codec = per_token(bits, group or None)
    return Side(codec=codec if codec.raw else codec.model_copy(update={"transform": Hadamard()}), retention=retention)
