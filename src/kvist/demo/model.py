"""The small model that comes with kvist: our own weights, in the wheel."""

from pathlib import Path
from typing import Any

from kvist.methods import parse
from kvist.models.find import find
from kvist.plan import Recipe

BUNDLED = "bundled"
FOLDER = Path(__file__).with_name("kvist-6m")
FITTED = Path(__file__).with_name("kvquant")  # artefacts of 2, 3 and 4 bits, by `kvist calibrate` on training novels


def recipe(text: str) -> Recipe:
    """The recipe of a method's text; what must be fitted comes from the artefacts beside the model."""
    made = parse(text)
    if not made.needs:
        return made
    widths = sorted({side.codec.levels.bits for plan in made.layers for side in plan.sides})
    for bits in widths:
        if not (FITTED / str(bits)).is_dir():
            raise ValueError(f"no artefact of {bits} bits comes with the bundled model; `kvist calibrate` makes one")
    return parse(text, artifact=",".join(str(FITTED / str(bits)) for bits in widths))


def load(name: str = BUNDLED, dtype: str = "auto") -> tuple[Any, Any]:
    """The bundled model, or another that `kvist.models.find` knows ("smollm2"), in evaluation mode, and its tokenizer.
    `dtype`: "auto" is that of the weights. Nothing is downloaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = FOLDER if name == BUNDLED else find(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
