"""Train the reference models: `python scripts/train_reference.py NAME... --text FOLDER_OR_FILE`.

Training that was cut off goes on from its last checkpoint with --resume. A model's record, training.json, says what it
saw and what it can do.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from anatomy import anatomy, sentences
from lessons import FIRST, THEN, Lessons
from torch import nn
from trainer import CHECKPOINT, Budget, Machine, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from variants import VARIANTS, build, chosen, config_of, parameters, read_json, save, start_from

from kvist import __version__
from kvist.atomic import write_json
from kvist.cli.errors import Verbs
from kvist.evaluate.questions import KINDS, score
from kvist.evaluate.tasks.recall import Haystack, Recall
from kvist.text import digest, sample, texts

TOKENIZER = Path(__file__).parents[1] / "references/kvist-6m"
LENGTHS, REST = (1000, 1900), 148  # tokens of contexts for recall; what is left for a question
WINDOWS = 4  # of text, for the anatomy
RECORD = "training.json"


@torch.no_grad()
def recall(model: nn.Module, tokenizer, documents: list[str], lengths: tuple[int, ...], samples: int) -> dict:
    """The mean score of greedy answers for each kind of question and length, with its count of questions."""
    found: dict[str, dict] = {}
    haystack = Haystack(tuple(documents), "held out")
    for kind in KINDS:
        found[kind] = {"questions": samples}
        for length in lengths:
            task = Recall(kind, tokenizer, haystack, (length,), samples=samples, seed=1)
            scores = []
            for number in range(0, task.count, task.count // samples):  # all depths alike
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
    """Measure recall and anatomy of a finished model on held-out text, and add them to its record. ValueError where
    there is no such model."""
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"there is no finished model in {folder}; give --text to train one")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    context = model.config.max_position_embeddings
    seen = anatomy(model, sample(tokenizer, documents, WINDOWS, min(context, 1024)).to(device))
    print("\n".join([folder.name, *("  " + sentence for sentence in sentences(seen))]), flush=True)
    lengths = tuple(sorted({*LENGTHS, context - REST} if context > 2048 else LENGTHS))
    found = recall(model, tokenizer, documents, lengths, samples)
    print(f"  recall at {', '.join(map(str, lengths))} tokens", flush=True)
    for kind, scores in found.items():
        print(f"  {kind}  " + "  ".join(f"{scores[str(length)]:.2f}" for length in lengths), flush=True)
    measured = {"recall": found, "recall_text": digest(documents), "anatomy": seen}
    write_json(folder / RECORD, read_json(folder / RECORD) | measured)


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"allow_interspersed_args": True},
)


@app.callback(invoke_without_command=True, no_args_is_help=True)
def main(
    names: Annotated[list[str], typer.Argument(help="Variants, or all.", metavar="NAME...")],
    text: Annotated[Path | None, typer.Option(help="A text file, or a folder of them (.txt, .txt.xz).")] = None,
    out: Annotated[Path, typer.Option(help="Each model gets a folder of its name in it.")] = Path("references"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training, for each model.")] = 45.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training, instead of minutes.")] = None,
    start: Annotated[Path | None, typer.Option(help="A model that is copied as far as it fits.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.  [default: all]")] = None,
    tokens: Annotated[int | None, typer.Option(min=256, help="Of a step.  [default: 4096, on a GPU 32768]")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile it: two minutes, then a third faster.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and lessons.")] = 0,
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
    place = device_of(device)
    left = [name for name in wanted if not finished(out / name, resume)] if text else []
    documents, unseen = (documents_of(path) if path else [] for path in (text if left else None, evaluate))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    most = 32768 if place.type == "cuda" else 4096
    machine = Machine(place, tokens or most, compiled, most)
    for name in left:
        folder = out / name
        model = build(config_of(VARIANTS[name], tokenizer), seed)
        given = start_from(model, start) if start else []
        trainer = Trainer(model, Lessons(tokenizer, documents), machine, seed, given)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).is_file():
            trainer.load(folder / CHECKPOINT)
        trainer.run(Budget(60 * minutes, steps), folder)
        record = record_of(trainer, name, start.name if start else None, digest(documents))
        save(trainer.model, tokenizer, folder)
        write_json(folder / RECORD, record)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    for name in wanted:
        if unseen:
            look(out / name, unseen, samples, place)


def finished(folder: Path, resume: bool) -> bool:
    """Whether a model is there already, which is right where training goes on with others. ValueError where a folder
    would be written over."""
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; remove it, or go on from its checkpoint with --resume")
    return (folder / "model.safetensors").is_file() and not (folder / CHECKPOINT).is_file()


def device_of(name: str) -> torch.device:
    """A device by its name. ValueError where this machine has none of that name."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"a device is cpu, cuda or auto, found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that torch can use; give --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


if __name__ == "__main__":
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
