"""attach(model) and detach(model)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import PreTrainedModel

from kvist.attention.function import packed_attention
from kvist.attention.mask import lazy_mask
from kvist.models.compat import CACHE_NAMES, takes
from kvist.types import ATTACHED

# The name of an attached attention says what it falls back to. "flash" in a name means something to transformers, and
# stays; so does "sdpa", that a mask may be left out, which we decide ourselves.
SDPA = ATTACHED
KNOWN = "sdpa", "eager", "flex_attention"  # and flash: all compute the same as packed attention


@dataclass
class Attachment:
    """A model reads packed data while this is open: `close()` it, or use it as a context manager."""

    model: nn.Module
    before: list[tuple[PreTrainedConfig, str]]

    def close(self) -> None:
        """Give the model its own attention back, exactly."""
        for config, own in self.before:
            config._attn_implementation_internal = own
        self.before = []

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def attach(model: nn.Module) -> Attachment:
    """Switch on the attention that reads packed data, for this model alone.

    Models that call `F.scaled_dot_product_attention` themselves (Falcon) need no switch: the handles answer it. What
    packed attention cannot serve falls back, on decoded tensors, to what the model would have called: its own eager
    function, sdpa, flash or flex attention, with the mask of that kind.
    """
    _listen_to_the_interface()
    before = []
    for config in _configs(model):
        own = config._attn_implementation
        if _own(own) is not None:
            continue
        if own not in KNOWN and not str(own).startswith("flash_attention"):
            raise ValueError(
                f"kvist attaches to models that run with {', '.join(KNOWN)} or flash attention, found {own!r}; set one "
                "of them with model.set_attn_implementation"
            )
        name = SDPA if own == "sdpa" else f"{ATTACHED}_{own}"
        AttentionInterface.register(name, _answered_by_the_interface)
        if own in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, lazy_mask(own))
        before.append((config, own))
        config._attn_implementation_internal = name
    return Attachment(model, before)


def detach(model: nn.Module) -> None:
    """Undo `attach`, whoever called it."""
    for config in _configs(model):
        own = _own(config._attn_implementation)
        if own is not None:
            config._attn_implementation_internal = own


def _own(name: str | None) -> str | None:
    """The attention that an attached one stands before; None for any other name."""
    if name == SDPA:
        return "sdpa"
    prefix = f"{ATTACHED}_"
    return name.removeprefix(prefix) if name and name.startswith(prefix) else None


def _configs(model: nn.Module) -> list:
    """The configs of the parts of a model that take a cache and use transformers' attention interface. Towers beside
    them (vision, audio) have no packed data to read, and stay as they are."""
    found = {}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not takes(type(module), CACHE_NAMES):
            continue
        text = module.config.get_text_config(decoder=True)
        if text is module.config and module._can_set_attn_implementation():
            found[id(text)] = text
    return list(found.values())


def _answered_by_the_interface(*args, **kwargs):
    raise RuntimeError("attached attention is had from AttentionInterface.get_interface, which knows the model's own")


def _listen_to_the_interface() -> None:
    """From the first `attach` on, whoever asks transformers for an attached attention gets one that falls back to what
    the asking module would have got: its own eager function, too, which has no name that could be looked up."""
    asked: Callable = AttentionInterface.get_interface
    if hasattr(asked, "knows_attached"):
        return

    made: dict[tuple, Callable] = {}  # one per name and fallback: it is asked for in every layer, at every step

    @functools.wraps(asked)
    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        if not attn_implementation or not attn_implementation.startswith(ATTACHED):
            return asked(self, attn_implementation, default)
        own = _own(attn_implementation)
        fallback = asked(self, own, default)
        if (own, fallback) not in made:
            made[own, fallback] = packed_attention(str(own), fallback)
        return made[own, fallback]

    vars(get_interface)["knows_attached"] = True  # a wrapper that somebody puts around this one says so, too
    AttentionInterface.get_interface = get_interface
