"""Train the reference models: `python scripts/train_reference.py NAME... --text FOLDER_OR_FILE`.

Induction heads come from repeated segments alone and first; then text, recall and sums at growing lengths. A model that
was cut off goes on from its last checkpoint with --resume. Its record, training.json, says what it saw and can do.
"""

import json
import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from lessons import FIRST, THEN, Lesson, Lessons
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from variants import VARIANTS, build, chosen, config_of, parameters, read_json, save, start_from

from kvist import __version__
from kvist.atomic import replacing, write_json
from kvist.calibrate.text import digest, texts
from kvist.cli.errors import Verbs
from kvist.evaluate.questions import KINDS, score
from kvist.evaluate.recall import Haystack, Recall

TOKENIZER = Path(__file__).parents[1] / "src/kvist/demo/kvist-6m"
SHORT, LEAST = 128, 256  # tokens of a sequence: of the first stage, and just after it
FORMED, LONGEST = 0.7, 0.25  # the first stage ends at this loss on repeats, or after this share of all training
GROWTH = (0.3, 0.55, 0.75)  # shares of the rest after which sequences double; the last doubling is to the context
RATES = {"matrices": 5e-3, "others": 2e-3}
KEPT = 0.3  # of the rate, for tensors that were given at the start
WARM, COOL = 0.01, 0.5  # shares of training: the rate rises until, and falls from
RECORD, CHECKPOINT = "training.json", "checkpoint.safetensors"


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
        doublings = sum(passed >= share for share in GROWTH)
        longest = self.context if doublings == len(GROWTH) else LEAST * 2**doublings
        return min(longest, self.context), THEN

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
        print(f"{name}  {progress:4.0%}  step {self.state.step}  length {length}  {speed:,.0f} tokens/s  {losses}", flush=True)

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


@torch.no_grad()
def recall(model: nn.Module, tokenizer, documents: list[str], lengths: tuple[int, ...], samples: int) -> dict:
    """The mean score of greedy answers for each kind of question and length, with its count of questions."""
    found: dict[str, dict] = {}
    haystack = Haystack(tuple(documents), "held out")
    for kind in KINDS:
        found[kind] = {"questions": samples}
        for length in lengths:
            depths = tuple(i / 4 for i in range(5)) if samples % 5 == 0 else (0.5,)
            task = Recall(kind, tokenizer, haystack, (length,), depths, samples, limit=samples, seed=1)
            scores = []
            for number in range(samples):
                item = task.item(number)
                prompt = torch.tensor([[*item.prompt.context, *item.prompt.question]], device=model.device)
                made = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=item.prompt.most, do_sample=False
                )
                answer = tokenizer.decode(made[0, prompt.shape[1] :]).split("\n")[0]
                scores.append(score(item.question.expected, answer))
            found[kind][str(length)] = round(math.fsum(scores) / samples, 4)
    return found


def documents_of(path: Path) -> list[str]:
    """The documents of a text file, or of all .txt and .txt.xz files in a folder, in their order."""
    files = sorted([*path.glob("*.txt"), *path.glob("*.txt.xz")]) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"expected .txt or .txt.xz files in {path}, found none")
    return [document for file in files for document in texts(str(file))]


def record_of(trainer: Trainer, name: str, start: str | None, hashed: str) -> dict:
    """What a model is and what it saw, as JSON."""
    state = trainer.state
    return {
        "variant": {"name": name, **VARIANTS[name]},
        "parameters": parameters(trainer.model),
        "steps": state.step,
        "first_stage_steps": state.formed,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "seed": trainer.seed,
        "text": hashed,
        "start": start,
        "copied_tensors": len(trainer.given),
        "shares": {"first": FIRST, "then": THEN},
        "losses": {kind: round(loss, 4) for kind, loss in sorted(state.losses.items())},
        "versions": {"kvist": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def look(folder: Path, documents: list[str], samples: int, device: torch.device) -> None:
    """Measure recall and anatomy of a finished model on held-out text, and add them to its record."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    lengths = tuple(sorted({1000, 1900, model.config.max_position_embeddings - 148}))
    print(f"{folder.name}: recall at {', '.join(map(str, lengths))} tokens", flush=True)
    found = recall(model, tokenizer, documents, lengths, samples)
    for kind, scores in found.items():
        print(f"  {kind}  " + "  ".join(f"{scores[str(length)]:.2f}" for length in lengths), flush=True)
    write_json(folder / RECORD, read_json(folder / RECORD) | {"recall": found, "recall_text": digest(documents)})


app = typer.Typer(cls=Verbs, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True, no_args_is_help=True)
def main(
    names: Annotated[list[str], typer.Argument(help="Variants, or all.", metavar="NAME...")],
    text: Annotated[Path | None, typer.Option(help="A text file, or a folder of them (.txt, .txt.xz).")] = None,
    out: Annotated[Path, typer.Option(help="Each model gets a folder of its name in it.")] = Path("references"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training, for each model.")] = 45.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training, instead of minutes.")] = None,
    start: Annotated[Path | None, typer.Option(help="A model whose tensors outside attention are copied.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.  [default: all]")] = None,
    tokens: Annotated[int | None, typer.Option(min=256, help="Of a step.  [default: 4096, on a GPU 32768]")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model: a minute, then a third faster.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    evaluate: Annotated[Path | None, typer.Option(help="A held-out text, to measure recall on when done.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions of each kind and length.")] = 20,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train reference models, or measure finished ones (without --text)."""
    wanted = chosen(names)
    if text is None and evaluate is None:
        raise ValueError("nothing to do: give --text to train, --evaluate to measure, or both")
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    documents, unseen = (documents_of(path) if path else [] for path in (text, evaluate))
    if text:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        lessons, hashed = Lessons(tokenizer, documents), digest(documents)
        gpu = place.type == "cuda"
        machine = Machine(place, tokens or (32768 if gpu else 4096), compiled, 32768 if gpu else 4096)
        for name in wanted:
            model = build(config_of(VARIANTS[name], tokenizer), seed)
            given = start_from(model, start) if start else []
            trainer = Trainer(model, lessons, machine, seed, given)
            train(trainer, out / name, Budget(60 * minutes, steps), resume)
            write_json(out / name / RECORD, record_of(trainer, name, start.name if start else None, hashed))
            save(trainer.model, tokenizer, out / name)
            (out / name / CHECKPOINT).unlink(missing_ok=True)
    for name in wanted:
        if unseen:
            look(out / name, unseen, samples, place)


def train(trainer: Trainer, folder: Path, budget: Budget, resume: bool) -> None:
    """Train into a folder. ValueError where there is another model already, or nothing to go on from."""
    checkpoint = folder / CHECKPOINT
    if resume:
        if not checkpoint.is_file():
            raise ValueError(f"there is no checkpoint in {folder} to go on from; leave --resume out")
        trainer.load(checkpoint)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; remove it, or go on from its checkpoint with --resume")
    folder.mkdir(exist_ok=True)
    trainer.run(budget, folder)


if __name__ == "__main__":
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
