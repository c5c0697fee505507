"""A kvist cache with the oracle at its side, and the comparison of what a model says over either."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from models_tiny import tiny_llama
from oracle import OracleCache
from torch import Tensor

import kvist
from kvist.cache.handle import Handle
from kvist.cache.view import View
from kvist.models.compat import cache_argument

ROUGH = (14, 13, 12, 11)  # significant bits of the oracle's rough runs, of fp32's 24
MARGIN = 4
WAYS = ("attached", "sdpa", "eager")


class Shadow(kvist.Cache):
    """At every update the oracle is given the same keys and values, and must hold the same numbers."""

    def __init__(self, model, recipe, mask: Tensor | None = None, **options):
        super().__init__(model, recipe, **options)
        self.oracle = OracleCache(self.recipe, len(self.layers), mask)
        self.wanted: dict[int, tuple[Tensor, Tensor]] = {}
        self.checked = self.attended = 0

    def announce(self, batch: int, slots: int, mask: Tensor | None, positions: Tensor | None = None) -> None:
        super().announce(batch, slots, mask, positions)
        self.oracle.told(batch, slots, mask, positions)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        wanted = self.oracle.update(key_states, value_states, layer_idx)
        real = self.real(layer_idx)[:, None, :, None]
        for found, want, side in zip(given, wanted, self.layers[layer_idx].plan.sides, strict=True):
            found = found.dense() if isinstance(found, Handle) else found
            same(found.masked_fill(~real, 0), want, side)
        self.wanted[layer_idx] = wanted
        self.checked += 1
        return given

    def real(self, layer_idx: int) -> Tensor:
        """Which slots hold tokens, (B, slots)."""
        return torch.tensor([row.real for row in self.oracle.layers[layer_idx].rows])

    @contextmanager
    def watching(self):
        """Meanwhile, attention over this cache's pages is compared with attention over the oracle's tensors."""
        own = View.attend

        def attend(view: View, query: Tensor, scale: float, **options) -> Tensor:
            out = own(view, query, scale, **options)
            index = next(i for i, layer in enumerate(self.layers) if layer is view.layer)
            seeing = {name: options[name] for name in ("mask", "causal") if name in options}
            same_attention(out, query, *self.wanted[index], self.real(index), **seeing)
            self.attended += 1
            return out

        View.attend = attend
        try:
            yield
        finally:
            View.attend = own

    def __getattribute__(self, name: str):
        if name in ("crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "reset"):
            first, second = super().__getattribute__(name), getattr(self.oracle, name)

            def both(*args):
                first(*args)
                second(*args)

            return both
        return super().__getattribute__(name)


def same(found: Tensor, wanted: Tensor, side) -> None:
    """Equal to the bit, except where a rotation adds up in another order: then to a few units of rounding."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if side.codec.transform.kind == "identity":
        assert torch.equal(found, wanted), f"{int((found != wanted).sum())} of {found.numel()} numbers differ"
    else:
        slack = 64 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (found - wanted).abs().max() <= slack


def same_attention(out: Tensor, query: Tensor, keys: Tensor, values: Tensor, real: Tensor, mask=None, causal=True):
    """`out` is attention over `keys` and `values`, as exact as fp32 gives it: of the last slots where `causal`, else of
    queries that see what the boolean `mask` says."""
    count, slots = query.shape[2], keys.shape[2]
    if causal:
        mask = torch.ones(count, slots, dtype=torch.bool).tril(slots - count)
    seen = real[:, None, None].expand(-1, -1, count, -1)
    seen = seen if mask is None else seen & mask
    truth, single = (
        F.scaled_dot_product_attention(*(x.to(kind) for x in (query, keys, values)), attn_mask=seen, enable_gqa=True)
        for kind in (torch.float64, torch.float32)
    )
    unasked = ~real[:, None, -count:, None] if causal else ~seen.any(-1, keepdim=True)
    rounding = (single - truth).abs().masked_fill(unasked, 0).max().clamp_min(torch.finfo(torch.float32).eps)
    worst = (out - truth).abs().masked_fill(unasked, 0).max()
    assert worst <= 16 * rounding, f"attention differs by {worst:.2e}, rounding is {rounding:.2e}"


class Spoken(NamedTuple):
    """What a run said: logits of each step (B, V), and all tokens."""

    logits: list[Tensor]
    tokens: Tensor


Run = Callable[[object, object], Spoken]


def compare(run: Run, recipe, way: str = "attached", mask: Tensor | None = None, layers: int = 2) -> None:
    """`run(model, cache)` says the same over kvist's cache, oracle at its side, as over the oracle alone.

    Each attention is held to fp32's rounding. From layer to layer rounding can tip a code over to its neighbour, so for
    logits the budget is MARGIN times what the oracle's own move when its keys and values are rounded to ROUGH bits.
    Which codes are near enough to tip depends on the processor's sums: a rough run may tip none where ours tips one, so
    that the next rougher one is asked before it is an error.
    """
    model = tiny_llama("eager" if way == "eager" else "sdpa", layers)
    with torch.no_grad():
        shadow = Shadow(model, recipe, mask)
        with kvist.attach(model) if way == "attached" else nullcontext(), shadow.watching():
            found = run(model, shadow)
        assert shadow.checked
        assert shadow.attended or way != "attached" or not recipe.layers[0].packs
        assert not (shadow.attended and way == "eager")
        wanted = run(model, OracleCache(recipe, layers, mask, model=model))
        shadow.close()
        agree(found, wanted, (run(model, OracleCache(recipe, layers, mask, bits, model)) for bits in ROUGH))
    if recipe.name == "exact":
        assert torch.equal(found.tokens, wanted.tokens)


def agree(found: Spoken, wanted: Spoken, rough_runs: Iterable[Spoken]) -> None:
    """Tokens part no earlier than rounding makes them part, and logits before that are within the budget, of one of
    the rough runs."""
    steps, told = together(found, wanted), []
    worst = max(distance(found, wanted, steps))
    for rough in rough_runs:
        rough_steps = together(rough, wanted)
        budget = MARGIN * max(distance(rough, wanted, rough_steps))
        assert budget > 0
        if steps >= rough_steps and worst <= budget:
            return
        told.append(f"tokens part at step {rough_steps}, budget {budget:.2e}")
    raise AssertionError(
        f"tokens part at step {steps}, logits differ by {worst:.2e}; under rounding: {'; '.join(told)}"
    )


def together(a: Spoken, b: Spoken) -> int:
    """Steps whose logits follow from equal tokens."""
    if torch.equal(a.tokens, b.tokens):
        return len(a.logits)
    width = min(a.tokens.shape[1], b.tokens.shape[1])
    start = max(0, width - len(b.logits))
    parted = (a.tokens[:, start:width] != b.tokens[:, start:width]).any(0).nonzero()
    return 1 + (int(parted[0]) if len(parted) else width - start - 1)


def distance(a: Spoken, b: Spoken, steps: int) -> list[float]:
    return [float((x - y).abs().max()) for x, y in zip(a.logits[:steps], b.logits[:steps], strict=True)]


def generating(inputs: dict[str, Tensor], new: int, seed: int = 0, **options) -> Run:
    """A run of `model.generate`."""

    def run(model, cache) -> Spoken:
        torch.manual_seed(seed)
        settings = {"max_new_tokens": new, "do_sample": False} | options
        out = model.generate(
            **inputs, **cache_argument(cache), output_logits=True, return_dict_in_generate=True, **settings
        )
        return Spoken(list(out.logits), out.sequences)

    return run
