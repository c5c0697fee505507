"""`kvist profile`: what each layer's keys and values are worth to the loss."""

from dataclasses import dataclass
from pathlib import Path

from kvist.cli import files
from kvist.cli.options import MODEL, Data, Where, command
from kvist.cli.show import Bars, Printed, table
from kvist.flags import argument, flag

CHOICES = (1, 2, 3, 4, 8)


def parse_choices(text: str) -> tuple[int, ...]:
    """Widths from '2,3,4', ascending."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise ValueError(f"--choices is a list of widths such as 2,3,4, found {text!r}") from None


@dataclass(frozen=True)
class Scored:
    """What is scored, on which prompts, and where the profile goes."""

    model: str = argument(..., MODEL)
    prompts: str = flag(..., "wikitext2, c4, a name in --data-dir, a text file (also .xz), or .jsonl with prompts.")
    out: Path = flag(..., "The JSON file that the profile is written to.", "-o")
    method: tuple[str, ...] = flag(("kvmix",), "Whose codecs' errors are measured; repeatable.", "-m")
    choices: tuple[int, ...] = flag((), "Widths to try.  [default: those of 1,2,3,4,8 it has]", parse=parse_choices)
    samples: int = flag(30, "Prompts.", least=2)
    seqlen: int = flag(1024, "Tokens of a prompt, at most.", least=2)
    seed: int = flag(0, "Of the prompts that are drawn.")
    plot: Path | None = flag(None, "Also draw the scores, prompt by prompt, to this PNG file.")


@dataclass(frozen=True)
class There(Where):
    """Gradients are taken there."""

    dtype: str = flag(
        "auto", "auto (as saved; CPUs, and float16, whose gradients underflow: float32), float32 or bfloat16."
    )


@command
def profile(scored: Scored, data: Data, where: There, printed: Printed) -> None:
    """Score every layer's keys and values, by one backward pass per prompt. An interrupted run goes on where it was.

    Example: kvist profile Qwen/Qwen3-0.6B --prompts wikitext2 --out qwen.json;
    kvist allocate qwen.json --method kivi --budget 3.5 --out bits.json;
    kvist run Qwen/Qwen3-0.6B --method kivi --allocation bits.json -p Hi
    """
    out, plot, prompts = scored.out, scored.plot, scored.prompts
    files.check_plot(plot)
    files.check_json(out)
    methods = {text: _widths(text, scored.choices) for text in dict.fromkeys(scored.method)}
    if where.dtype == "float16":
        raise ValueError("gradients underflow in float16; use --dtype float32, or bfloat16 where memory is short")

    from kvist import text
    from kvist.calibrate.sensitivity import profile as measure
    from kvist.cli.models import for_gradients, load

    loaded, tokenizer = load(scored.model, where.device, for_gradients(where.device, where.dtype))
    if str(loaded.dtype) == "torch.float16":
        loaded = loaded.float()
    drawn, digest = text.draw(tokenizer, prompts, data.data_dir, scored.samples, scored.seqlen, scored.seed)
    source = {"source": prompts, "digest": digest, "seed": scored.seed}
    with Bars() as bars:
        found = measure(loaded, drawn, methods, **source, progress=bars.show, out=out)
    if plot:
        from kvist.calibrate.draw import draw

        draw(found, plot)
    measured = {**found.model_dump(mode="json"), "summary": found.summary(), "unstable": found.unstable}
    printed.warn(*found.unstable)
    printed.say({"profile": str(out)} | measured, _table(found), f"use it by kvist allocate {out} --out FILE")


def _widths(text: str, choices: tuple[int, ...]) -> tuple[int, ...]:
    """The widths that a method has, or those asked for."""
    from kvist.methods import parse, widths

    for bits in choices:
        parse(text, k=bits, v=bits)
    return choices or tuple(widths(text, CHOICES))


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
