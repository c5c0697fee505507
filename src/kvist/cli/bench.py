"""`kvist bench`: measurements; each one is a function of kvist.bench."""

from dataclasses import dataclass
from pathlib import Path

import typer

from kvist.cli import files
from kvist.cli.options import Where, command
from kvist.cli.show import Printed
from kvist.flags import argument, flag
from kvist.units import parse_size, size

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed and memory.")


@app.callback()
def bench() -> None:
    """Measure speed and memory."""


@dataclass(frozen=True)
class Measured:
    """What is measured of ours, and where results go."""

    method: tuple[str, ...] = flag((), "A method of ours; repeatable.", "-m")
    out: Path | None = flag(None, "File for the results, as JSON.")


@dataclass(frozen=True)
class Steps(Measured):
    """How decode steps are measured."""

    length: tuple[int, ...] = flag((), "Tokens in the cache; repeatable.", "-n", least=1)
    steps: int = flag(40, "Measured steps of each contender.", least=1)
    threads: int = flag(0, "Threads of torch; 0 leaves them as they are.", least=0)
    seed: int = flag(0, "Seed of the random keys and values.")


@app.command()
@command
def decode(asked: Steps, printed: Printed) -> None:
    """One decode step against transformers' own caches: medians and ratios of interleaved runs.

    Example: kvist bench decode --length 4096 --method kivi:2 --method 'kivi k=2 v=4'
    """
    from kvist.bench import decode as measured
    from kvist.methods import parse

    for text in asked.method:
        parse(text)
    chosen = asked.length or measured.LENGTHS, asked.method or measured.METHODS
    measured.run(*chosen, asked.steps, asked.threads, asked.seed, asked.out, printed.json)


@dataclass(frozen=True)
class Generated(Measured):
    """How steps of `generate` are measured."""

    batch: int = flag(1, "Rows; more than one are padded on the left.", least=1)
    tokens: int = flag(25, "Generated tokens of a run.", least=3)
    rounds: int = flag(8, "Runs of each contender, in turn.", least=1)
    threads: int = flag(1, "Threads of torch.", least=1)
    seed: int = flag(0, "Seed of the random model.")


@app.command()
@command
def steps(asked: Generated, printed: Printed) -> None:
    """What a token of `generate` costs the host with a model of 32 tiny layers, against transformers' own caches.

    Example: kvist bench steps --method kivi:2 --batch 8
    """
    from kvist.bench import steps as measured

    run = measured.Run(asked.batch, asked.tokens, asked.rounds, asked.threads, asked.seed)
    measured.run(asked.method or measured.METHODS, run, asked.out, printed.json)


@dataclass(frozen=True)
class Rounds(Measured):
    """How encoding is measured."""

    rounds: int = flag(15, "Measured rounds.", least=1)


@app.command()
@command
def encode(asked: Rounds, printed: Printed) -> None:
    """Bulk encoding on one core in MB/s of 16-bit input, and microseconds for a page of 64 tokens.

    Example: kvist bench encode --method kivi:2
    """
    from kvist.bench import encode as measured

    measured.run(asked.method or measured.METHODS, asked.rounds, asked.out, printed.json)


@dataclass(frozen=True)
class Whole:
    """Whole generations: of which model, how long, in how much memory."""

    model: str | None = argument(None, "A model's folder, or its name on the Hugging Face Hub.")
    random_weights: str | None = flag(None, "A shape: llama-2-7b, llama-3-8b, qwen3-0.6b ….")
    layers: int = flag(0, "Only so many layers of --random-weights; 0: all.", least=0)
    preset: str | None = flag(None, "kivi, kvmix or logquant: the shape, lengths and methods of a paper.")
    prompt_tokens: int | None = flag(None, "Tokens of each prompt.  [default: 512]", least=1)
    new_tokens: int | None = flag(None, "Tokens generated after it.  [default: 128]", least=2)
    method: tuple[str, ...] = flag((), "A method of ours; repeatable.  [default: kivi:2]", "-m")
    memory: int | None = flag(
        None, "What a run may take beside the weights: 4GiB.  [default: 80 % of what is free]", parse=parse_size
    )
    batch: int | None = flag(None, "The largest batch; without, memory ends it.", least=1)
    chunk: int = flag(0, "Read prompts in chunks of so many tokens; 0: whole.", least=0)
    rounds: int = flag(1, "Measured runs of each batch, after a warm-up.", least=1)
    seed: int = flag(0, "Of prompts and random weights.")
    out: Path | None = flag(None, "File for the results, as JSON; written after every run.")
    plot: Path | None = flag(None, "File for a picture, as PNG.")


@dataclass(frozen=True)
class There(Where):
    """Where random weights may be, too."""

    dtype: str = flag("auto", "auto (as saved; random: bfloat16), float32, float16, bfloat16.")


@app.command()
@command
def throughput(whole: Whole, where: There, printed: Printed) -> None:
    """Whole generations at batches that double until memory ends, against transformers' dynamic and static cache.

    Nothing is run that is predicted not to fit. `kvist run` lets OpenMP's idle threads sleep; to measure that, set
    OMP_WAIT_POLICY=passive. Example: kvist bench throughput --random-weights qwen3-0.6b --layers 2 --memory 3GiB
    """
    from kvist.bench.presets import preset as known
    from kvist.bench.shapes import shape
    from kvist.methods import parse

    chosen = known(whole.preset) if whole.preset else None
    if whole.model and whole.random_weights:
        raise ValueError("MODEL and --random-weights name two models; give one of them")
    name = whole.random_weights or (chosen.shape if chosen and not whole.model else None)
    if not whole.model and not name:
        raise ValueError("nothing to measure: give a MODEL, --random-weights llama-2-7b or --preset kivi")
    if whole.layers and whole.model:
        raise ValueError("--layers cuts --random-weights; a MODEL keeps its layers")
    recipes = {text: parse(text) for text in whole.method}
    config = shape(name, whole.layers) if name else None
    files.check_plot(whole.plot)

    from kvist.bench import throughput as measured
    from kvist.bench.generation import Lengths

    if config:
        model = _random(config, where, whole.seed)
        name = f"{name}, random weights, {config.num_hidden_layers} layers"
    else:
        from kvist.cli.models import load

        name = str(whole.model)
        model = load(name, where.device, where.dtype)[0]
    if not recipes:
        from kvist.models.adapter import describe

        texts = chosen.methods(len(describe(model).served)) if chosen else {"kivi:2": "kivi:2"}
        recipes = {called: parse(text) for called, text in texts.items()}
    prompt, new = (chosen.prompt, chosen.new) if chosen else (512, 128)
    lengths = Lengths(whole.prompt_tokens or prompt, whole.new_tokens or new, whole.chunk)
    race = measured.Race(lengths, whole.memory, whole.batch, whole.rounds, whole.seed)
    measured.run(model, recipes, str(name), race, chosen, whole.out, printed.json, whole.plot)


def _random(config, where: Where, seed: int):
    """A model of random weights, if there is room for it."""
    import torch

    from kvist.bench.memory import free
    from kvist.bench.shapes import nbytes, outline, random_weights
    from kvist.cli.models import placed, precision

    place = placed(where.device)
    kind = torch.bfloat16 if where.dtype == "auto" else precision(where.dtype)
    needed, room = nbytes(outline(config, kind)), free(place)
    if needed > room:
        raise ValueError(f"the weights take {size(needed)} but {size(room)} are free; give --layers 2, or fewer")
    return random_weights(config, kind, place, seed)
