"""The training of one reference model: its curriculum, its steps, and its checkpoints.

Induction heads come from repeated segments alone and first; then text, recall and sums at growing lengths.
"""

import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lessons import FIRST, THEN, Lesson, Lessons
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from kvist.atomic import replacing

SHORT, LEAST = 128, 256  # tokens of a sequence: of the first stage, and just after it
FORMED, LONGEST = 0.7, 0.25  # the first stage ends at this loss on repeats, or after this share of all training
GROWN = 0.75  # of the rest: by then sequences have doubled, in equal times, to the context
RATES = {"matrices": 5e-3, "others": 2e-3}
KEPT = 0.4  # of the rate, for tensors that were given at the start
WARM, COOL = 0.01, 0.5  # shares of training: the rate rises until, and falls from
CHECKPOINT = "checkpoint.safetensors"


@dataclass
class State:
    """Where training stands: steps, tokens and seconds so far; the step at which the first stage ended; a running loss
    for each kind of lesson (nats per counted token)."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    formed: int | None = None
    share: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)

    def note(self, kind: str, loss: float) -> None:
        self.losses[kind] = loss + 0.95 * (self.losses.get(kind, loss) - loss)


@dataclass(frozen=True)
class Budget:
    """How long: steps, or seconds where there are none. save: seconds between checkpoints."""

    seconds: float
    steps: int | None = None
    save: float = 180.0

    def progress(self, state: State) -> float:
        return state.step / self.steps if self.steps else state.seconds / self.seconds


@dataclass(frozen=True)
class Machine:
    """Where: a device; tokens: of a step, at least; compiled: whether the model is."""

    device: torch.device
    tokens: int
    compiled: bool = False
    chunk: int = 4096  # tokens that go through the model together


class Trainer:
    """One model, its optimizers and its state."""

    def __init__(self, model: nn.Module, lessons: Lessons, machine: Machine, seed: int, given: list[str]):
        self.model, self.lessons, self.machine, self.seed = model.to(machine.device).train(), lessons, machine, seed
        self.context, self.given = model.config.max_position_embeddings, given
        self.trunk = torch.compile(model.model, dynamic=False) if machine.compiled else model.model
        self.state, self.optimizers = State(), self._optimizers()

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Muon for the matrices between embeddings, AdamW for the rest."""
        sides: dict[str, list[dict]] = {side: [] for side in RATES}
        for name, weight in self.model.named_parameters():
            side = "matrices" if weight.dim() == 2 and "embed" not in name else "others"
            rate = RATES[side] * (KEPT if name in self.given else 1.0)
            sides[side].append({"params": [weight], "lr": rate, "rate": rate})
        return {
            "matrices": torch.optim.Muon(sides["matrices"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            "others": torch.optim.AdamW(sides["others"], weight_decay=0.0, betas=(0.9, 0.98)),
        }

    def run(self, budget: Budget, folder: Path) -> None:
        """Train to the end of the budget; a checkpoint now and then."""
        saved, began, told = time.perf_counter(), time.perf_counter() - self.state.seconds, (0, 0.0)
        while (progress := budget.progress(self.state)) < 1:
            self.step(progress)
            now = time.perf_counter()
            self.state.seconds = now - began
            if self.state.step % 20 == 0:
                speed = (self.state.tokens - told[0]) / (self.state.seconds - told[1])
                self._tell(folder.name, progress, speed)
                told = self.state.tokens, self.state.seconds
            if now - saved > budget.save:
                self.store(folder / CHECKPOINT)
                saved = now

    def step(self, progress: float) -> None:
        """One update; everything drawn follows from the seed and the step."""
        draws, state = random.Random(f"{self.seed} {self.state.step}"), self.state
        if state.formed is None and (state.losses.get("repeats", 9.0) < FORMED or progress > LONGEST):
            state.formed, state.share = state.step, progress
        length, shares = self._stage(progress)
        count = max(self.machine.tokens // (2 if state.formed is None else 1) // length, 4)
        drawn = [self.lessons.draw(shares, length, draws) for _ in range(count)]
        at_once = max(1, self.machine.chunk // length)
        for first in range(0, count, at_once):
            self._backward(drawn[first : first + at_once], count)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * pace(progress)
            optimizer.step()
            optimizer.zero_grad()
        state.step, state.tokens = state.step + 1, state.tokens + count * length

    def _stage(self, progress: float) -> tuple[int, dict[str, float]]:
        if self.state.formed is None:
            return min(SHORT, self.context), FIRST
        passed = (progress - self.state.share) / (1 - self.state.share)
        stages = max(0, math.ceil(math.log2(self.context / LEAST)))
        doublings = min(int(passed / GROWN * stages), stages)
        return min(LEAST * 2**doublings, self.context), THEN

    def _backward(self, drawn: list[tuple[str, Lesson]], count: int) -> None:
        """Every sequence weighs the same, however many of its tokens count."""
        device = self.machine.device
        ids = torch.tensor([lesson.ids for _, lesson in drawn], device=device)
        counted = torch.tensor([lesson.counted for _, lesson in drawn], device=device)[:, 1:]
        with torch.autocast(device.type, torch.bfloat16):
            hidden = self.trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][counted]
            logits = self.model.lm_head(hidden)
        each = functional.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
        rows = counted.nonzero()[:, 0]
        sizes = counted.sum(1)
        losses = torch.zeros(len(drawn), device=device).index_add(0, rows, each) / sizes.clamp_min(1)
        (losses.sum() / count).backward()
        for (kind, _), loss in zip(drawn, losses.tolist(), strict=True):
            self.state.note(kind, loss)

    def _tell(self, name: str, progress: float, speed: float) -> None:
        losses = "  ".join(f"{kind} {loss:.2f}" for kind, loss in sorted(self.state.losses.items()))
        length = self._stage(progress)[0]
        print(
            f"{name}  {progress:4.0%}  step {self.state.step}  length {length}  {speed:,.0f} tokens/s  {losses}",
            flush=True,
        )

    def store(self, path: Path) -> None:
        """Weights, optimizers and state in one file."""
        tensors = {f"model {name}": weight for name, weight in self.model.named_parameters()}
        for side, optimizer in self.optimizers.items():
            for number, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{side} {number} {name}": value for name, value in values.items()}
        with replacing(path) as scratch:
            metadata = {"state": json.dumps(vars(self.state)), "given": json.dumps(self.given)}
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch, metadata)

    def load(self, path: Path) -> None:
        """Go on from a file that `store` wrote."""
        with safe_open(path, "pt") as given:
            metadata, tensors = given.metadata(), {name: given.get_tensor(name) for name in given.keys()}  # noqa: SIM118
        self.given, self.state = json.loads(metadata["given"]), State(**json.loads(metadata["state"]))
        self.optimizers = self._optimizers()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"model {name}"])
        for side, optimizer in self.optimizers.items():
            found: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for name, tensor in tensors.items():
                if name.startswith(f"{side} "):
                    _, number, value = name.split()
                    found[int(number)][value] = tensor
            optimizer.load_state_dict({"state": dict(found), "param_groups": optimizer.state_dict()["param_groups"]})


def pace(progress: float) -> float:
    """The share of the learning rate: up in a line, flat, down in a line to a twentieth."""
    if progress < WARM:
        return max(progress / WARM, 0.05)
    return 1.0 if progress < COOL else 1 - 0.95 * (progress - COOL) / (1 - COOL)
