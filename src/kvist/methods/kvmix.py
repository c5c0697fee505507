"""KVmix (Li et al., AAAI 2026, arXiv 2506.08018). Layers are not equally sensitive: each layer and side has its own
width, and keeps its own share of recent tokens exact. The widths come as an allocation, which every method with k and
v takes; a profile proposes one. Three bits are a plane of two and a plane of one: 4.0 stored bits at groups of 32 (the
published format stores 5.8)."""

from typing import Literal

from kvist.methods.parts import Width, check_group, per_channel, per_token, width
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Ratio, Share

RATIOS = {"paper": {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2}, "reference": {1: 0.1, 2: 0.2, 3: 0.2, 4: 0.3}}


@method("KVmix, arXiv 2506.08018")
def kvmix(
    bits: int = 2,
    k: Width = None,
    v: Width = None,
    group: int = 32,
    ratio: float = 0.0,
    ratios: Literal["", "paper", "reference"] = "",
    ratio_of: Literal["waiting", "context"] = "waiting",
) -> Recipe:
    """Bits per layer and side (`k=3,2,2,2 v=4,2,2,2` or `allocation=FILE.json`), a share of recent tokens exact. The
    share is `ratio`, or by width (0): as in the paper, .2 at 3 bits and more, .1 below (`ratios=paper`, unless the
    allocation says otherwise), or .3 at 4 bits and more, .2 at 2 and 3, .1 at 1 (`ratios=reference`, as in the
    published code). It is taken of the tokens that wait, as published, which leaves a few tokens in decoding, or of
    the whole context (`ratio-of=context`)."""
    check_group(group, group)
    if ratios not in ("", *RATIOS):
        raise ValueError(f"ratios must be 'paper' or 'reference' (the published code's), found {ratios!r}")
    if ratio_of not in ("waiting", "context"):
        raise ValueError(f"ratio-of must be 'waiting' (as published) or 'context', found {ratio_of!r}")
    rule, shares = Ratio if ratio_of == "waiting" else Share, RATIOS[ratios or "paper"]

    def side(code, own: Width) -> Side:
        codec = code(width(own, bits), group)
        return Side(codec=codec, retention=rule(ratio=ratio or shares[min(width(own, bits), 4)], group=group))

    plan = LayerPlan(key=side(per_channel, k), value=side(per_token, v))
    return Recipe(name="kvmix", paper=kvmix.paper, layers=(plan,))
