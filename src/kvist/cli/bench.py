"""`kvist bench`: measurements; each one is a function of kvist.bench."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Json, check_plot
from kvist.units import parse_size, size

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed and memory.")


@app.callback()
def bench() -> None:
    """Measure speed and memory."""


@app.command()
def decode(
    length: Annotated[
        list[int] | None, typer.Option("--length", "-n", min=1, help="Tokens in the cache; repeatable.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="A method of ours; repeatable.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each contender.")] = 40,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves them as they are.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random keys and values.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    json: Json = False,
) -> None:
    """One decode step against transformers' own caches: medians and ratios of interleaved runs.

    Example: kvist bench decode --length 4096 --method kivi:2 --method 'kivi k=2 v=4'
    """
    from kvist.bench import decode as measured
    from kvist.methods import parse

    for text in method or ():
        parse(text)
    chosen = {"lengths": length, "methods": method}
    measured.run(
        **{k: v for k, v in chosen.items() if v}, steps=steps, threads=threads, seed=seed, out=out, as_json=json
    )


@app.command()
def steps(
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="A method of ours; repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows; more than one are padded on the left.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Generated tokens.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each contender, in turn.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random model.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    json: Json = False,
) -> None:
    """What a token of `generate` costs the host with a model of 32 tiny layers, against transformers' own caches.

    Example: kvist bench steps --method kivi:2 --batch 8
    """
    from kvist.bench import steps as measured

    chosen = {"methods": method} if method else {}
    measured.run(**chosen, batch=batch, tokens=tokens, rounds=rounds, threads=threads, seed=seed, out=out, as_json=json)


@app.command()
def encode(
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="A method of ours; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 15,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    json: Json = False,
) -> None:
    """Bulk encoding on one core in MB/s of 16-bit input, and microseconds for a page of 64 tokens.

    Example: kvist bench encode --method kivi:2
    """
    from kvist.bench import encode as measured

    measured.run(**({"methods": method} if method else {}), rounds=rounds, out=out, as_json=json)


@app.command()
def throughput(
    model: Annotated[str | None, typer.Argument(help="A model's folder, or its name on the Hugging Face Hub.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option("--random-weights", help="A shape: llama-2-7b, llama-3-8b, qwen3-0.6b …."),
    ] = None,
    layers: Annotated[int, typer.Option(min=0, help="Only so many layers of --random-weights; 0: all.")] = 0,
    preset: Annotated[
        str | None, typer.Option(help="kivi, kvmix or logquant: the shape, lengths and methods of a paper.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each prompt.  [default: 512]")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens generated after it.  [default: 128]")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="A method of ours; repeatable.  [default: kivi:2]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What a run may take beside the weights: 4GiB.  [default: 80 % of what is free]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="The largest batch; without, memory ends it.")] = None,
    chunk: Annotated[int, typer.Option(min=0, help="Read prompts in chunks of so many tokens; 0: whole.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each batch, after a warm-up.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved; random: bfloat16), float32, float16, bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of prompts and random weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON; written after every run.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture, as PNG.")] = None,
    json: Json = False,
) -> None:
    """Whole generations at batches that double until memory ends, against transformers' dynamic and static cache.

    Nothing is run that is predicted not to fit. `kvist run` lets OpenMP's idle threads sleep; to measure that, set
    OMP_WAIT_POLICY=passive. Example: kvist bench throughput --random-weights qwen3-0.6b --layers 2 --memory 3GiB
    """
    from kvist.bench.presets import preset as known
    from kvist.bench.shapes import shape
    from kvist.methods import parse

    chosen = known(preset) if preset else None
    if model and random_weights:
        raise ValueError("MODEL and --random-weights name two models; give one of them")
    random_weights = random_weights or (chosen.shape if chosen and not model else None)
    if not model and not random_weights:
        raise ValueError("nothing to measure: give a MODEL, --random-weights llama-2-7b or --preset kivi")
    if layers and model:
        raise ValueError("--layers cuts --random-weights; a MODEL keeps its layers")
    limit = parse_size(memory) if memory else None
    recipes = {text: parse(text) for text in method or ()}
    config = shape(random_weights, layers) if random_weights else None
    check_plot(plot)

    from kvist.bench import throughput as measured

    if config:
        loaded, name = _random(config, device, dtype, seed), f"{random_weights}, random weights"
        name += f", {config.num_hidden_layers} layers"
    else:
        from kvist.cli.models import load

        loaded, name = load(str(model), device, dtype)[0], str(model)
    if not recipes:
        from kvist.models.adapter import describe

        texts = chosen.methods(len(describe(loaded).served)) if chosen else {"kivi:2": "kivi:2"}
        recipes = {called: parse(text) for called, text in texts.items()}
    measured.run(
        loaded,
        recipes,
        prompt_tokens or (chosen.prompt if chosen else 512),
        new_tokens or (chosen.new if chosen else 128),
        name,
        limit=limit,
        most=batch,
        rounds=rounds,
        seed=seed,
        preset=chosen,
        out=out,
        as_json=json,
        plot=plot,
        chunk=chunk,
    )


def _random(config, device: str, dtype: str, seed: int):
    """A model of random weights, if there is room for it."""
    import torch

    from kvist.bench.memory import free
    from kvist.bench.shapes import nbytes, outline, random_weights
    from kvist.cli.models import placed, precision

    place, kind = placed(device), torch.bfloat16 if dtype == "auto" else precision(dtype)
    needed, room = nbytes(outline(config, kind)), free(place)
    if needed > room:
        raise ValueError(f"the weights take {size(needed)} but {size(room)} are free; give --layers 2, or fewer")
    return random_weights(config, kind, place, seed)
