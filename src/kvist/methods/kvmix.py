"""KVmix (Li et al., AAAI 2026, arXiv 2506.08018). Layers are not equally sensitive: each layer and side has its own
width, and keeps its own share of recent tokens exact. This file takes the widths as given; a profile proposes them.
Three bits are a plane of two and a plane of one: 4.0 stored bits at groups of 32 (the published format stores 5.8)."""

from kvist.allocation import Allocation
from kvist.methods.parts import per_channel, per_token, width
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Ratio

Widths = int | tuple[int, ...] | None


@method("KVmix, arXiv 2506.08018")
def kvmix(
    bits: int = 2,
    k: Widths | None = None,
    v: Widths | None = None,
    allocation: str = "",
    group: int = 32,
    ratio: float = 0.0,
) -> Recipe:
    """Bits per layer and side: `k=3,2,2,2 v=4,2,2,2` or `allocation=FILE.json`; `ratio` of what waits stays exact
    (0: the paper's 0.2 at 3 and 4 bits, 0.1 at 1 and 2)."""
    if group not in (32, 64, 128):
        raise ValueError(f"group must be 32, 64 or 128, found {group}")
    if allocation and (k is not None or v is not None):
        raise ValueError("give either an allocation's file or k= and v=, not both")
    table = Allocation.load(allocation) if allocation else Allocation.of(width(k, bits), width(v, bits))
    layers = tuple(
        LayerPlan(
            key=Side(codec=per_channel(kb, group), retention=_rule(kb, ratio, group)),
            value=Side(codec=per_token(vb, group), retention=_rule(vb, ratio, group)),
        )
        for kb, vb in zip(table.k, table.v, strict=True)
    )
    return Recipe(name="kvmix", paper=kvmix.paper, layers=layers)


def _rule(bits: int, ratio: float, group: int) -> Ratio:
    return Ratio(ratio=ratio or (0.2 if bits >= 3 else 0.1), group=group)
