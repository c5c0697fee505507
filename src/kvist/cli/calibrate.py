"""`kvist calibrate`: fit what a method needs to a model, from text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvist.cli import files
from kvist.cli.options import MODEL, Data, Where, command
from kvist.cli.show import Bars, Printed
from kvist.flags import argument, flag


@dataclass(frozen=True)
class Fitted:
    """What is fitted to, from which text, and where it goes."""

    model: str = argument(..., MODEL)
    data: str = flag(..., "wikitext2, c4, a name in --data-dir, or a text file (also .xz).")
    out: Path = flag(..., "The folder that the artefact is written into.", "-o")
    method: str = flag("kvquant bits=3 outliers=1%", "With bits=2, 3, 4 (or 5, to simulate) and outliers=1%.", "-m")
    samples: int = flag(16, "Windows of text.", least=1)
    seqlen: int = flag(2048, "Tokens per window.", least=8)
    seed: int = flag(0, "Of the windows that are drawn.")
    qnorm: Literal["auto", "on", "off"] = flag("auto", "auto (at 2 bits), on or off.")
    push: str | None = flag(None, "Also push to this repository on the Hugging Face Hub.")


@dataclass(frozen=True)
class Chosen:
    """Fields of `kvist.artifact.Settings` that the method's text does not say."""

    sensitivity: Literal["fisher-scaled", "fisher", "none"] = flag(
        "fisher-scaled", "fisher-scaled (F·s², the paper's), fisher (F, its code's) or none."
    )
    sinks: int | None = flag(None, "First tokens that stay exact.  [default: 1]", least=0)
    cap: Literal["token", "none"] = flag(
        "token", "token: as many outliers in every token; none: those beyond the thresholds."
    )
    levels: Literal["nuq", "nf", "int"] = flag("nuq", "nuq (fitted), nf (normal-float) or int (even).")
    keys: Literal["pre-rope", "post-rope"] = flag("pre-rope", "pre-rope or post-rope.")
    key_axis: Literal["channel", "token"] = flag("channel", "channel (fixed ranges) or token (found online).")


@dataclass(frozen=True)
class There(Where):
    """Text is read and gradients are taken there."""

    dtype: str = flag("auto", "auto (as saved; CPUs: float32), float32, float16 or bfloat16.")


@command
def calibrate(fitted: Fitted, chosen: Chosen, data: Data, where: There, printed: Printed) -> None:
    """Fit tables and thresholds of keys and values to a model. An interrupted run goes on where it was.

    Example: kvist calibrate Qwen/Qwen3-0.6B --data wikitext2 --method 'kvquant bits=3 outliers=1%' --out qwen-nuq3;
    kvist run Qwen/Qwen3-0.6B --method 'kvquant artifact=qwen-nuq3' --prompt 'Once upon a time'
    """
    settings, out = _settings(fitted.method, chosen), fitted.out
    files.check_folder(out)

    from kvist import text
    from kvist.artifact import JSON, TENSORS
    from kvist.calibrate.run import calibrate as fit
    from kvist.cli.models import for_gradients, load

    documents = text.texts(fitted.data, data.data_dir, "train")
    loaded, tokenizer = load(fitted.model, where.device, for_gradients(where.device, where.dtype))
    windows = text.sample(tokenizer, documents, fitted.samples, fitted.seqlen, fitted.seed)
    with Bars() as bars:
        artifact = fit(
            loaded,
            windows,
            settings,
            source=fitted.data,
            digest=text.digest(documents),
            seed=fitted.seed,
            folder=out,
            qnorm=fitted.qnorm,
            progress=bars.show,
        )
    if fitted.push:
        artifact.push(fitted.push)
    nbytes = sum((out / name).stat().st_size for name in (JSON, TENSORS))
    told = {"artifact": str(out), "nbytes": nbytes, "on_grid": artifact.on_grid}
    slots = artifact.settings.slots
    room = [f"{slots} outlier slots of keys per token hold those of 99.9 % of the tokens seen"] if slots else []
    printed.say(
        told | artifact.model_dump(mode="json", exclude={"keys", "values"}),
        *(f"{artifact}: {nbytes} bytes in {out}", *room, f"use it by --method 'kvquant artifact={out}'"),
    )


def _settings(method: str, chosen: Chosen):
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
    outliers = getattr(key.codec.outliers, "share", 0.0)
    if chosen.cap == "none" and not outliers:
        raise ValueError("--cap none is about outliers, and there are none; give outliers=1% or leave --cap out")
    if chosen.cap == "none" and chosen.key_axis == "token":
        raise ValueError("--cap none needs thresholds of channels, and keys per token have none; use --cap token")
    said = {"bits": key.codec.levels.bits, "outliers": outliers, "sinks": recipe.layers[0].sinks}
    given = {name: value for name, value in vars(chosen).items() if value is not None}
    return Settings.model_validate(said | given)
