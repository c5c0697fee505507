"""One backward pass per prompt: how much the loss asks of each layer's keys and values (KVmix section 3.2).

The pass tells two things at once. Of the projections' weights, the norm of the loss's gradient. Of keys and values
themselves, F, the mean squared gradient of each channel, and E, the mean squared error that each candidate codec makes
in it. Half the sum of F·E is the second-order change of the loss; F is of other prompts than E, so that what is
expected is not what was seen.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from kvist import __version__
from kvist.cache.cache import Cache
from kvist.calibrate.profile import Changes, Norms, Profile
from kvist.calibrate.run import Progress, at_rest, origin, quiet
from kvist.calibrate.state import State
from kvist.methods import parse
from kvist.models.adapter import describe, fingerprint
from kvist.models.projections import projections, weight_gradients
from kvist.models.taps import listen_back
from kvist.plan import LayerPlan, Side

STAGE = "profile"
Candidates = dict[str, list[tuple[LayerPlan, ...]]]


def profile(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    methods: Mapping[str, Sequence[int]],
    *,
    source: str,
    digest: str,
    seed: int,
    out: str | Path,
    progress: Progress = quiet,
) -> Profile:
    """The scores of each served layer of `model` over `prompts`, int64 (T,) each, kept in the JSON file `out`.

    methods: the widths to try of each method, by its text. source, digest and seed say where the prompts come from. An
    interrupted run goes on from what it left beside `out`. Raises ValueError for a model or prompts that cannot serve.
    """
    if model.dtype == torch.float16:
        raise ValueError("gradients underflow in float16; load the model in bfloat16 or float32")
    if len(prompts) < 2:
        raise ValueError("a profile needs 2 prompts or more: sensitivities and errors are of different ones")
    facts, candidates = describe(model), _candidates(model, methods, min(map(len, prompts)))
    layers = len(facts.served)
    out = Path(out)
    state = State(out.parent, _key(model, prompts, candidates), out.name + ".progress")
    found = _Pass(state, candidates, len(prompts), layers)
    try:
        with at_rest(model):
            sources = projections(model)
            for i in range(state.done.get(STAGE, 0), len(prompts)):
                ids = prompts[i].unsqueeze(0).to(model.device)
                found.prompt, found.tokens = i, ids.shape[1] - 1
                with weight_gradients(sources, found.weights):
                    listen_back(model, ids, found.activations)
                state.step(STAGE, i + 1)
                progress(STAGE, i + 1, len(prompts))
    except KeyboardInterrupt:
        state.save()
        raise
    made = Profile(
        model=facts.identity,
        dtype=str(model.dtype).removeprefix("torch."),
        origin=origin(source, digest, seed, prompts),
        gradient_norm=found.norms(),
        loss_change=tuple(found.changes(name, tuple(widths)) for name, widths in methods.items()),
    )
    made.save(out)
    state.clear()
    return made


class _Pass:
    """What the hooks of one prompt add to. Tensors: norms (2, layers, prompts); of each side, squared gradients
    (layers, prompts, channels); of each method and side, squared errors (layers, widths, prompts, channels)."""

    def __init__(self, state: State, candidates: Candidates, prompts: int, layers: int):
        self.tensors, self.candidates = state.tensors, candidates
        self.prompts, self.layers = prompts, layers
        self.prompt = self.tokens = 0

    def _room(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = torch.zeros(shape)
        return self.tensors[name]

    def weights(self, layer: int, side: int, norm: float) -> None:
        """Of the mean loss per token, as the paper's."""
        self._room("norms", 2, self.layers, self.prompts)[side, layer, self.prompt] = norm / self.tokens

    def activations(self, layer: int, side: int, x: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        channels = x.shape[1] * x.shape[3]
        squares = gradient[0].float().square().sum(1).flatten() / self.tokens
        self._room(f"gradients.{side}", self.layers, self.prompts, channels)[layer, self.prompt] = squares.cpu()
        for name, widths in self.candidates.items():
            errors = self._room(f"errors.{side}.{name}", self.layers, len(widths), self.prompts, channels)
            for i, plans in enumerate(widths):
                errors[layer, i, self.prompt] = _error(plans[layer].sides[side], x).cpu()

    def norms(self) -> Norms:
        return Norms(**{name: _nested(self.tensors["norms"][side]) for side, name in enumerate("kv")})

    def changes(self, method: str, widths: tuple[int, ...]) -> Changes:
        sides = {}
        for side, name in enumerate("kv"):
            gradients, errors = self.tensors[f"gradients.{side}"], self.tensors[f"errors.{side}.{method}"]
            others = [gradients[:, 1 - half :: 2].double().mean(1) for half in (0, 1)]  # (layers, channels)
            change = torch.empty(errors.shape[:-1], dtype=torch.float64)
            for half in (0, 1):
                change[:, :, half::2] = (errors[:, :, half::2].double() * others[half][:, None, None]).sum(-1) / 2
            sides[name] = _nested(change)
        return Changes(method=method, choices=widths, **sides)


def _error(side: Side, x: Tensor) -> Tensor:
    """Mean squared error of each channel (H·D,) when tokens (1, H, T, D) behind the sinks are coded in whole groups."""
    first = side.retention.sinks
    x = x[:, :, first : first + side.round(x.shape[2] - first)].float()
    at = torch.arange(first, first + x.shape[2], device=x.device).unsqueeze(0)
    read = side.codec.decode(side.codec.encode(x, at), at).float()
    return (read - x)[0].square().mean(1).flatten()


def _candidates(model: PreTrainedModel, methods: Mapping[str, Sequence[int]], shortest: int) -> Candidates:
    """Per method and width, a plan for each layer. Refused before the hours, not after: what does not suit the model,
    and prompts too short for a group."""
    found: Candidates = {}
    for text, widths in methods.items():
        found[text] = []
        for bits in widths:
            recipe = parse(text, k=bits, v=bits)
            Cache(model, recipe).close()
            plans = recipe.for_layers(len(describe(model).served))
            needed = max(plan.sinks + plan.granule for plan in plans)
            if shortest < needed:
                raise ValueError(
                    f"a prompt has {shortest} tokens, {text!r} codes {needed} at once; give longer prompts"
                )
            found[text].append(plans)
    return found


def _key(model: PreTrainedModel, prompts: Sequence[Tensor], candidates: Candidates) -> str:
    """What progress belongs to: of an artefact, what is in it, not its name alone."""
    plans = {name: [[plan.model_dump_json() for plan in x] for x in widths] for name, widths in candidates.items()}
    facts = [fingerprint(model), str(model.dtype), plans, __version__]
    made = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    for ids in prompts:
        made.update(ids.numpy().tobytes() + b"|")
    return made.hexdigest()


def _nested(x: Tensor) -> tuple:
    """Numbers of six digits, enough for a score, in nested tuples."""
    return tuple(map(_nested, x)) if x.dim() > 1 else tuple(float(f"{v:.6g}") for v in x.tolist())
