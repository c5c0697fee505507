"""`kvist calibrate`: fit what a method needs to a model, from text."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvist.cli.show import MODEL, Bars, Json, dump


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Annotated[str, typer.Option(help="wikitext2, c4, a name in --data-dir, or a text file (also .xz).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder that the artefact is written into.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="With bits=2, 3, 4 (or 5, to simulate) and outliers=1%.")
    ] = "kvquant bits=3 outliers=1%",
    data_dir: Annotated[Path | None, typer.Option(help="A folder of data, with train/NAME.txt or .txt.xz.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 16,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 2048,
    sensitivity: Annotated[
        str, typer.Option(help="fisher-scaled (F·s², the paper's), fisher (F, its code's) or none.")
    ] = "fisher-scaled",
    sinks: Annotated[int | None, typer.Option(min=0, help="First tokens that stay exact.  [default: 1]")] = None,
    cap: Annotated[
        str, typer.Option(help="token: as many outliers in every token; none: those beyond the thresholds.")
    ] = "token",
    qnorm: Annotated[str, typer.Option(help="auto (at 2 bits), on or off.")] = "auto",
    levels: Annotated[str, typer.Option(help="nuq (fitted), nf (normal-float) or int (even).")] = "nuq",
    keys: Annotated[str, typer.Option(help="pre-rope or post-rope.")] = "pre-rope",
    key_axis: Annotated[str, typer.Option(help="channel (fixed ranges) or token (found online).")] = "channel",
    seed: Annotated[int, typer.Option(help="Of the windows that are drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved; CPUs: float32), float32, float16 or bfloat16.")] = "auto",
    push: Annotated[str | None, typer.Option(help="Also push to this repository on the Hugging Face Hub.")] = None,
    json: Json = False,
) -> None:
    """Fit tables and thresholds of keys and values to a model. An interrupted run goes on where it was.

    Example: kvist calibrate Qwen/Qwen3-0.6B --data wikitext2 --method 'kvquant bits=3 outliers=1%' --out qwen-nuq3;
    kvist run Qwen/Qwen3-0.6B --method 'kvquant artifact=qwen-nuq3' --prompt 'Once upon a time'
    """
    settings = _settings(method, sensitivity, sinks, cap, levels, keys, key_axis)
    _among("--qnorm", qnorm, ("auto", "on", "off"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is a folder, found a file at {out}")

    from kvist import text
    from kvist.artifact import JSON, TENSORS
    from kvist.calibrate.run import calibrate as fit
    from kvist.cli.models import for_gradients, load

    documents = text.texts(data, data_dir, "train")
    loaded, tokenizer = load(model, device, for_gradients(device, dtype))
    windows = text.sample(tokenizer, documents, samples, seqlen, seed)
    with Bars() as bars:
        artifact = fit(
            loaded,
            windows,
            settings,
            source=data,
            digest=text.digest(documents),
            seed=seed,
            folder=out,
            qnorm=_literal(qnorm),
            progress=bars.show,
        )
    if push:
        artifact.push(push)
    nbytes = sum((out / name).stat().st_size for name in (JSON, TENSORS))
    if json:
        head = artifact.model_dump(mode="json", exclude={"keys", "values"})
        return dump({"artifact": str(out), "nbytes": nbytes, "on_grid": artifact.on_grid, **head})
    print(f"{artifact}: {nbytes} bytes in {out}")
    if artifact.settings.slots:
        print(f"{artifact.settings.slots} outlier slots of keys per token hold those of 99.9 % of the tokens seen")
    print(f"use it by --method 'kvquant artifact={out}'")
    return None


def _settings(method: str, sensitivity: str, sinks: int | None, cap: str, levels: str, keys: str, key_axis: str):
    """What is asked for, checked before anything heavy is loaded."""
    from kvist.artifact import Settings
    from kvist.methods import parse

    recipe = parse(method)
    if recipe.name != "kvquant" or recipe.model is not None:
        raise ValueError(
            f"expected a method that can be fitted, such as 'kvquant bits=3 outliers=1%', found {method!r}"
        )
    key = recipe.layers[0].key
    if len({side.codec.levels.bits for plan in recipe.layers for side in plan.sides}) > 1:
        raise ValueError("an artefact has one width; calibrate once for each, and choose among them by k= and v=")
    if key.retention.kind != "none":
        raise ValueError("a recent window is chosen when the artefact is used, not when it is fitted; leave it out")
    given = {"sensitivity": sensitivity, "cap": cap, "levels": levels, "keys": keys, "key_axis": key_axis}
    for name, value in given.items():
        _among("--" + name.replace("_", "-"), value, Settings.model_fields[name].annotation.__args__)  # pyright: ignore
    outliers = getattr(key.codec.outliers, "share", 0.0)
    if cap == "none" and not outliers:
        raise ValueError("--cap none is about outliers, and there are none; give outliers=1% or leave --cap out")
    if cap == "none" and key_axis == "token":
        raise ValueError("--cap none needs thresholds of channels, and keys per token have none; use --cap token")
    chosen = {"bits": key.codec.levels.bits, "outliers": outliers, "sinks": recipe.layers[0].sinks}
    return Settings.model_validate(chosen | given | ({} if sinks is None else {"sinks": sinks}))


def _among(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} is one of {', '.join(known)}, found {value!r}")


def _literal(qnorm: str) -> Literal["auto", "on", "off"]:
    return qnorm  # pyright: ignore[reportReturnType]
