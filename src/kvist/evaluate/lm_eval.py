"""Our model class in lm-eval: `simple_evaluate(model="kvist", model_args={"pretrained": …, "method": "kivi:2"})` works
after this module is imported.

lm-eval takes log-likelihoods from one forward pass without a cache, where no quantization would show. Here each pass
has a cache of its own: "simulated", every token is quantized and back, as published tables are made; "stored", every
query sees what a living cache holds after the sequence, its windows included, so that a sequence that fits them is
exact. What is generated always comes from a living cache, whose prompt is read as the recipe says.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kvist.attention import attach
from kvist.cache.cache import Cache
from kvist.evaluate.contenders import Contender, check
from kvist.evaluate.definitions import harness
from kvist.evaluate.results import described
from kvist.evaluate.settings import Mode
from kvist.evaluate.simulate import Simulated
from kvist.evaluate.tokenwise import MODES, packed_bits
from kvist.methods import resolve
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.models.find import find
from kvist.plan import Recipe

register_model: Any = harness("api.registry").register_model
HFLM: Any = harness("models.huggingface").HFLM


@register_model("kvist")
class KvistLM(HFLM):
    """lm-eval's Hugging Face model with a packed cache. pretrained: as HFLM takes it, a GGUF file, or "smollm2"; other
    options as HFLM's. method: text, recipe or the path of its JSON. mode: how log-likelihoods are taken; it does not
    change what is generated."""

    def __init__(
        self,
        pretrained,
        *,
        method: str | Recipe | Path = "kivi:2",
        mode: Mode = "simulated",
        batch_size: int | str | None = 1,
        **options,
    ):
        if mode not in MODES:
            raise ValueError(f"a mode is {' or '.join(map(repr, MODES))}, found {mode!r}")
        if str(batch_size).startswith("auto"):
            raise ValueError(f"expected a number as batch size, found {batch_size!r}: caches are not probed; give 8")
        recipe = resolve(method)
        if isinstance(pretrained, str):
            pretrained = find(pretrained)
        super().__init__(pretrained=pretrained, batch_size=batch_size, **options)
        self.mode, self.silent, self.bits = mode, False, list[float]()
        self.take(recipe)

    def take(self, recipe: Recipe) -> None:
        """Go on with another recipe, and forget the bits of the last one. ValueError where it does not suit."""
        check(Contender(recipe.name, recipe), self.model)
        self.recipe, self.bits = recipe, []

    @property
    def bits_per_element(self) -> float:
        """Allocated bits per cached number, mean over all forward passes and generations; of a packed token where
        nothing was stored."""
        return sum(self.bits) / len(self.bits) if self.bits else packed_bits(self.recipe, describe(self.model))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results."""
        ours = {"method": self.recipe.name, "mode": self.mode, "bits_per_element": self.bits_per_element}
        return super().get_model_info() | {"kvist": ours | {"recipe": described(self.recipe)}}

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        """Sequences of equal lengths go through the model together. lm-eval pads on the right without a mask, which no
        causal logit sees, but scales that tokens share would."""
        groups = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            groups[min(len(context) + len(continuation), self.max_length + 1)].append(number)
        found: list = [None] * len(requests)
        shown = tqdm(total=len(requests), disable=disable_tqdm or self.silent or self.rank != 0, desc="Log-likelihoods")
        for length in sorted(groups, reverse=True):
            numbers = groups[length]
            answers = super()._loglikelihood_tokens([requests[n] for n in numbers], disable_tqdm=True)
            for n, answer in zip(numbers, answers, strict=True):
                found[n] = answer
            shown.update(len(numbers))
        shown.close()
        return found

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of sequences int64 (B, T) without padding."""
        assert attn_mask is None and labels is None, "decoder-only models alone are served"
        if self.mode == "simulated":
            return self._logits(inps, Simulated(self.model, self.recipe))
        cache = Cache(self.model, self.recipe, reserve=inps.shape[1], prefill="stored")
        try:
            # read decoded: every query of a sequence reads all of it, and one decode for all is faster
            return self._logits(inps, cache)
        finally:
            self._done(cache)

    def _logits(self, ids: Tensor, cache) -> Tensor:
        half = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            return self.model(ids, **cache_argument(cache)).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options) -> Tensor:
        """Tokens (B, T + new) behind contexts int64 (B, T), padded on the left, of which the options have the mask."""
        cache = Cache(self.model, self.recipe, reserve=max_length)
        try:
            with attach(self.model):
                return super()._model_generate(context, max_length, stop, **cache_argument(cache), **options)
        finally:
            self._done(cache)

    def _done(self, cache: Cache) -> None:
        if cache.get_seq_length():
            self.bits.append(cache.report().bits_per_element)
        cache.close()
