"""attach(model) and detach(model)."""

from dataclasses import dataclass

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import PreTrainedModel

from kvist.attention.function import packed_attention
from kvist.attention.mask import lazy_mask

NAMES = {"sdpa": "kvist", "eager": "kvist_eager"}  # a name with "sdpa" or "flash" in it means something to transformers


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
    packed attention cannot serve falls back to the model's own attention on decoded tensors.
    """
    before = []
    for config in _configs(model):
        own = config._attn_implementation
        if own in NAMES.values():
            continue
        name = NAMES.get(own)
        if name is None:
            raise ValueError(
                f"kvist attaches to models that run with 'sdpa' or 'eager' attention, found {own!r}; set one of them"
            )
        AttentionInterface.register(name, packed_attention(own))
        AttentionMaskInterface.register(name, lazy_mask(own))
        before.append((config, own))
        config._attn_implementation_internal = name
    return Attachment(model, before)


def detach(model: nn.Module) -> None:
    """Undo `attach`, whoever called it."""
    for config in _configs(model):
        for own, name in NAMES.items():
            if config._attn_implementation == name:
                config._attn_implementation_internal = own


def _configs(model: nn.Module) -> list:
    """The configs of all parts of a model that use transformers' attention interface."""
    found = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            found[id(module.config)] = module.config
    return list(found.values())
