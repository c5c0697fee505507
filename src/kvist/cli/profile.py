"""`kvist profile`: what each layer's keys and values are worth to the loss."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import MODEL, Bars, Json, check_plot, console, dump, parse_choices, put, table

CHOICES = (1, 2, 3, 4, 8)


def profile(
    model: Annotated[str, typer.Argument(help=MODEL)],
    prompts: Annotated[
        str,
        typer.Option(help="wikitext2, c4, a name in --data-dir, a text file (also .xz), or .jsonl with prompts."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file that the profile is written to.")],
    data_dir: Annotated[Path | None, typer.Option(help="A folder of data, with train/NAME.txt or .txt.xz.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Whose codecs' errors are measured; repeatable.  [default: kvmix]"),
    ] = None,
    choices: Annotated[str | None, typer.Option(help="Widths to try.  [default: those of 1,2,3,4,8 it has]")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Prompts.")] = 30,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a prompt, at most.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the prompts that are drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (as saved; CPUs, and float16, whose gradients underflow: float32), float32 or bfloat16."
        ),
    ] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Also draw the scores, prompt by prompt, to this PNG file.")] = None,
    json: Json = False,
) -> None:
    """Score every layer's keys and values, by one backward pass per prompt. An interrupted run goes on where it was.

    Example: kvist profile Qwen/Qwen3-0.6B --prompts wikitext2 --out qwen.json;
    kvist allocate qwen.json --method kivi --budget 3.5 --out bits.json;
    kvist run Qwen/Qwen3-0.6B --method kivi --allocation bits.json -p Hi
    """
    check_plot(plot)
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out is a JSON file in a folder that is there, found {out}")
    methods = {text: _widths(text, choices) for text in dict.fromkeys(method or ["kvmix"])}
    if dtype == "float16":
        raise ValueError("gradients underflow in float16; use --dtype float32, or bfloat16 where memory is short")

    from kvist import text
    from kvist.calibrate.sensitivity import profile as measure
    from kvist.cli.models import for_gradients, load

    loaded, tokenizer = load(model, device, for_gradients(device, dtype))
    if str(loaded.dtype) == "torch.float16":
        loaded = loaded.float()
    drawn, digest = text.draw(tokenizer, prompts, data_dir, samples, seqlen, seed)
    with Bars() as bars:
        found = measure(loaded, drawn, methods, source=prompts, digest=digest, seed=seed, progress=bars.show, out=out)
    if plot:
        from kvist.calibrate.draw import draw

        draw(found, plot)
    if json:
        data = found.model_dump(mode="json") | {"summary": found.summary(), "unstable": found.unstable}
        return dump({"profile": str(out)} | data)
    put(_table(found))
    for sentence in found.unstable:
        console(stderr=True).print(sentence)
    print(f"use it by kvist allocate {out} --out FILE")
    return None


def _widths(text: str, choices: str | None) -> tuple[int, ...]:
    """The widths that a method has, or those asked for."""
    from kvist.methods import parse, widths

    asked = parse_choices(choices)
    if asked is None:
        return tuple(widths(text, CHOICES))
    for bits in asked:
        parse(text, k=bits, v=bits)
    return asked


def _table(found):
    first = found.loss_change[0]
    at = [bits for bits in first.choices if bits <= 4]
    columns = [f"{side} {bits} bit" for side in ("keys", "values") for bits in at]
    made = table(
        f"{found.model.name}: {found.origin.samples} prompts of {found.origin.source}",
        *("layer", "|dL/dWk|", "|dL/dWv|", *columns),
        caption=f"gradient norms, and the loss change expected of {first.method}, nats per token; means over prompts",
    )
    for layer in range(found.model.layers):
        norms = [f"{found.norms(side)[layer]:.3g}" for side in ("k", "v")]
        changes = [f"{first.at(side, bits)[layer]:.2g}" for side in ("k", "v") for bits in at]
        made.add_row(str(layer), *norms, *changes)
    return made
