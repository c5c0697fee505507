"""Keys before their rotary embedding, in two ways.

`tagged`: tagged where the model rotates them, so that nothing has to be inverted. While it is open, the modeling file's
own rotary function is wrapped so that each rotated key carries the key it came from and the angles that were used:
exact to the bit, whatever the model does before (biases, norms, fused projections) and whatever its convention.

`rotary`: the embedding as plain data, found by probing the model's module and function, so that a cache can undo and
redo the rotation of any key at any position without the model (KVQuant section 3.2). `check` compares the two.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvist.coding.transforms import Unrotate
from kvist.kernels.rotary import angles
from kvist.models.adapter import SERVED, describe
from kvist.models.compat import cache_argument

NAME = "apply_rotary_pos_emb"
POSITIONS = (0, 1, 7, 1000)  # where angles are compared
TOLERANCE = 1e-4  # of cos, sin and keys of about 1, in fp32
OTHERWISE = "keys before RoPE are not available here; use keys=post-rope"


@dataclass(frozen=True)
class PreRope:
    """key (B, H, T, D) before rotation, and the cos and sin that rotated it."""

    key: Tensor
    cos: Tensor
    sin: Tensor


def pre_rope(key: Tensor) -> PreRope | None:
    """What `tagged` left on a rotated key; None if it was not rotated under it."""
    return getattr(key, "_kvist_pre_rope", None)


def _usual(module) -> bool:
    """Whether a modeling file rotates by a function of the usual name and arguments."""
    function = getattr(module, NAME, None)
    return function is not None and list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]


def _modules(model: nn.Module) -> list:
    """The modeling files of a model that rotate by the usual function."""
    found = {type(part).__module__ for part in model.modules()}
    return [module for name in sorted(found) if _usual(module := sys.modules[name])]


@contextmanager
def _observed(model: nn.Module, note: Callable[[Tensor, PreRope], None]) -> Iterator[None]:
    """While open, note(rotated key, what it came from) at every rotation. Wraps a function of the modeling file, for
    all models of that file, and puts the original back on leaving; the results are the original's."""
    wrapped = []

    def wrap(original):
        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
            q_out, k_out = original(q, k, cos, sin, *args, **kwargs)
            note(k_out, PreRope(k, cos, sin))
            return q_out, k_out

        return rotate

    try:
        for module in _modules(model):
            original = getattr(module, NAME)
            wrapped.append((module, original))
            setattr(module, NAME, wrap(original))
        yield
    finally:
        for module, original in wrapped:
            setattr(module, NAME, original)


def _tag(key: Tensor, before: PreRope) -> None:
    key._kvist_pre_rope = before  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Tag rotated keys while open, for all models of that modeling file; leaves no trace."""
    with _observed(model, _tag):
        yield


class _Spy(DynamicCache):
    """Keeps the keys that each layer's update was given, with their tag and the last rotation before them."""

    def __init__(self, config):
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, PreRope | None]] = {}
        self.turned: dict[int, tuple[Tensor, PreRope]] = {}
        self.last: list[tuple[Tensor, PreRope]] = []

    def note(self, key: Tensor, before: PreRope) -> None:
        _tag(key, before)
        self.last.append((key, before))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.seen[layer_idx] = (key_states, pre_rope(key_states))
        if self.last:
            self.turned[layer_idx] = self.last[-1]
            self.last.clear()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _listen(model: nn.Module) -> _Spy:
    """One forward of 5 tokens in evaluation mode; modes are put back."""
    spy, device = _Spy(model.config), next(model.parameters()).device
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with _observed(model, spy.note):
            model(torch.arange(1, 6, device=device).unsqueeze(0), **cache_argument(spy), use_cache=True)
    finally:
        for part, training in modes:
            part.training = training
    return spy


@torch.no_grad()
def self_test(model: nn.Module) -> None:
    """One short forward: every served layer's key must carry its tag, and rotating that must give the key to the bit.
    Raises ValueError with the layer and what was wrong."""
    spy = _listen(model)
    rotations = [getattr(module, NAME) for module in _modules(model)]
    for layer in describe(model).served:
        key, tag = spy.seen[layer]
        if tag is None:
            raise ValueError(
                f"layer {layer}: its keys reach the cache without the tag; keys before RoPE are not available here"
            )
        again = (rotate(tag.key, tag.key, tag.cos, tag.sin)[1] for rotate in rotations)
        if not any(torch.equal(key, k) for k in again if k.shape == key.shape):
            raise ValueError(
                f"layer {layer}: rotating the tagged key does not give the stored key; the model changes it after RoPE"
            )


@torch.no_grad()
def check(model: nn.Module, rotary: Unrotate) -> None:
    """One short forward: in every served layer, rotating the key before RoPE by the plain data must give the key that
    reaches the cache, within the rounding of the model's dtype. Raises ValueError with the layer and what was wrong.

    A family that slices off the rotated channels first (partial rotary) is compared on those; the others pass through.
    """
    if next(model.parameters()).is_meta:
        raise ValueError("expected a model with weights, found one on the meta device; load it and check again")
    spy = _listen(model)
    for layer in describe(model).served:
        key, _ = spy.seen[layer]
        if layer not in spy.turned:
            raise ValueError(f"layer {layer}: its keys reach the cache unrotated, or rotated elsewhere; {OTHERWISE}")
        turned, before = spy.turned[layer]
        width = turned.shape[-1]
        if turned.shape[:-1] != key.shape[:-1] or not torch.equal(key[..., :width], turned):
            raise ValueError(f"layer {layer}: the model changes its keys after RoPE; {OTHERWISE}")
        at = torch.arange(key.shape[-2], device=key.device).unsqueeze(0)
        slack = 8 * torch.finfo(key.dtype).eps * rotary.scaling * before.key.abs().max().float()
        if 2 * len(rotary.frequencies) > width or (rotary.inverse(before.key, at) - turned).abs().max() > slack:
            raise ValueError(
                f"layer {layer}: the rotary embedding read from the model is not this layer's; {OTHERWISE}"
            )


def rotary(model: nn.Module) -> Unrotate:
    """The rotary embedding of a model's served layers as plain data, found by probing its module and its function.

    Needs no forward and no weights (frequencies on the meta device are computed anew from the config), so it cannot
    see layers that use none of it: `check` can. Raises ValueError with the reason where there is none, where it depends
    on the length of the sequence, or where the probe does not reproduce it.
    """
    facts = describe(model)
    name, decoder = facts.name, getattr(model, "get_decoder", lambda: model)()
    found: dict[Unrotate, str] = {}
    for path, module in decoder.named_modules():
        if buffer := _buffer(module):
            found.setdefault(_probe(name, module, buffer.removesuffix("inv_freq"), facts.shape.key_dim), path)
    if not found:
        raise ValueError(f"{name} has no rotary embedding that kvist knows (a module with inv_freq); {OTHERWISE}")
    if len(found) > 1:
        raise ValueError(
            f"{name} has several rotary embeddings ({', '.join(found.values())}), expected one; {OTHERWISE}"
        )
    return next(iter(found))


def _buffer(module: nn.Module) -> str | None:
    """The name of a module's frequencies for served layers."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return next((name for name in (f"{SERVED}_inv_freq", "inv_freq") if name in names), None)


def _probe(name: str, module: nn.Module, prefix: str, dim: int) -> Unrotate:
    """What one rotary module and its file's function do, tried on the CPU; `prefix` is of the served layers' type."""
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(SERVED, "default") if isinstance(kind, dict) else kind
    if "dynamic" in kind or kind == "longrope":
        raise ValueError(
            f"{name}: the angles of {kind} RoPE depend on the sequence's length, and keys cached early keep old ones; "
            "use keys=post-rope"
        )
    if "mrope_section" in (getattr(getattr(module, "config", None), "rope_parameters", None) or {}):
        raise ValueError(f"{name}: its positions have several axes (mrope), a cache's slots have one; {OTHERWISE}")
    twin = _twin(name, module)
    frequencies = getattr(twin, f"{prefix}inv_freq").float()
    found = Unrotate(frequencies=tuple(frequencies.tolist()), scaling=getattr(twin, f"{prefix}attention_scaling", 1.0))
    cos, sin = _angles(name, twin, {"layer_type": SERVED} if prefix else {})
    expected = angles(torch.tensor(POSITIONS), frequencies)
    for ours, theirs in zip(expected, (cos, sin), strict=True):
        ours = ours * found.scaling
        layouts = (ours, torch.cat([ours, ours], -1), ours.repeat_interleave(2, -1))
        if not any(a.shape == theirs.shape[1:] and (a - theirs).abs().max() < TOLERANCE for a in layouts):
            raise ValueError(f"{name}: its rotary angles are not positions times inv_freq; {OTHERWISE}")
    return _style(name, module, found, cos, sin, dim)


def _twin(name: str, module: nn.Module) -> nn.Module:
    """The module on the CPU, sharing nothing that a call may write to."""
    if any(buffer.is_meta for buffer in module.buffers()):
        try:
            with torch.device("cpu"):
                return type(module)(module.config)
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{name}: its rotary frequencies are on the meta device; load its weights first"
            ) from error
    twin = copy.copy(module)
    twin._buffers = {key: None if value is None else value.cpu().clone() for key, value in module._buffers.items()}
    return twin


@torch.no_grad()
def _angles(name: str, twin: nn.Module, options: dict) -> tuple[Tensor, Tensor]:
    """cos and sin at POSITIONS in the model's layout. They come with a position beyond any length the model was made
    for, since embeddings that depend on the length change there."""
    far = 8 * int(getattr(twin, "max_seq_len_cached", 0) or 0) + 2000
    at = torch.tensor([[*POSITIONS, far]], device="cpu")
    forward = type(twin).forward  # not the instance's: wrappers there are bound to the model's own module
    try:
        cos, sin = forward(twin, torch.zeros(1, at.shape[-1], 1, device="cpu", dtype=torch.float32), at, **options)
        return cos[..., :-1, :].float(), sin[..., :-1, :].float()
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{name}: its rotary module does not give cos and sin of positions; {OTHERWISE}") from error


@torch.no_grad()
def _style(name: str, module: nn.Module, found: Unrotate, cos: Tensor, sin: Tensor, dim: int) -> Unrotate:
    """Which channels the file's own function pairs, seen on a random key of all channels, or of the rotated ones."""
    if not _usual(file := sys.modules[type(module).__module__]):
        raise ValueError(f"{name}: its modeling file has no function {NAME}(q, k, cos, sin); {OTHERWISE}")
    at = torch.tensor(POSITIONS, device="cpu").unsqueeze(0)
    generator = torch.Generator().manual_seed(0)
    for width in dict.fromkeys((dim, 2 * len(found.frequencies))):
        key = torch.randn(1, 2, len(POSITIONS), width, generator=generator, device="cpu", dtype=torch.float32)
        try:
            _, turned = getattr(file, NAME)(key, key, cos, sin)
        except RuntimeError:  # this family slices first: the shapes do not fit
            continue
        for style in get_args(Unrotate.model_fields["style"].annotation):
            candidate = found.model_copy(update={"style": style})
            if turned.shape == key.shape and (candidate.inverse(key, at) - turned).abs().max() < 10 * TOLERANCE:
                return candidate
    raise ValueError(f"{name}: its {NAME} pairs neither channels (i, i + R/2) nor (2i, 2i + 1); {OTHERWISE}")
