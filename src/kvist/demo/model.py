"""The demo's models: our own small one, which lies in a clone of the repository, and SmolLM2, which a package brings;
artefacts come with both."""

from pathlib import Path
from typing import Any

from kvist.methods import parse
from kvist.models.find import PACKAGED, find
from kvist.plan import Recipe

BUNDLED = "bundled"
REFERENCES = Path(__file__).parents[3] / "references"  # of a clone: what no wheel should weigh
FOLDER = REFERENCES / "kvist-6m"
FITTED = Path(__file__).with_name("kvquant")  # NAME/BITS: the artefact that the demo uses, by dev/artifacts.py
MORE = REFERENCES / "kvquant"  # the others of 2, 3 and 4 bits


def bundled() -> Path:
    """The folder of our own small model. ValueError where kvist was installed without it."""
    if not FOLDER.is_dir():
        raise ValueError(
            f"the model {BUNDLED} comes with a clone of kvist's repository, and kvist was installed without one; take "
            f"another model, such as {PACKAGED}"
        )
    return FOLDER


def fitted(name: str) -> bool:
    """Whether artefacts for this model come with the demo."""
    return name in (BUNDLED, PACKAGED)


def artifact(name: str, bits: int) -> Path:
    """The folder of an artefact for a model of the demo, whether or not it is there."""
    known = [folder / name / str(bits) for folder in (FITTED, MORE)]
    return next((folder for folder in known if folder.is_dir()), known[-1])


def recipe(text: str, name: str = BUNDLED) -> Recipe:
    """The recipe of a method's text for a model of the demo; what must be fitted comes from the artefacts beside it.
    ValueError where there is none for this model and width."""
    made = parse(text)
    if not made.needs:
        return made
    widths = sorted({side.codec.levels.bits for plan in made.layers for side in plan.sides})
    folders = [artifact(name, bits) for bits in widths]
    if missing := [bits for bits, at in zip(widths, folders, strict=True) if not (fitted(name) and at.is_dir())]:
        raise ValueError(f"no artefact of {missing[0]} bits comes for the model {name}; `kvist calibrate` makes one")
    return parse(text, artifact=",".join(map(str, folders)))


def load(name: str = BUNDLED, dtype: str = "auto") -> tuple[Any, Any]:
    """The bundled model, or another that `kvist.models.find` knows ("smollm2"), on the CPU, in evaluation mode, and its
    tokenizer. `dtype`: "auto" is that of the bundled weights, and what this CPU is fast in for other models, whose
    caches then keep exact tokens as the weights were saved. Nothing is downloaded. ValueError where it is not there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from kvist.bench.memory import free
    from kvist.models.precision import suit

    disable_progress_bar()
    folder = bundled() if name == BUNDLED else find(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
    if dtype == "auto" and name != BUNDLED:
        model = suit(model, free(model.device))
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
