"""A model by name, folder or file, or one sentence about why there is none."""

import sys
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "float16", "bfloat16")


def read_config(name: str):
    """The config alone: quick, and enough to know a model's caches."""
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers import AutoConfig

    set_verbosity_error()  # its retries are not the one sentence that a wrong name deserves
    name = found(name)
    return _checked(name, lambda: AutoConfig.from_pretrained(name))


def outline(name: str):
    """The model without its weights, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(name)
    with torch.device("meta"):
        return _checked(name, lambda: AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16))


def load(name: str, device: str, dtype: str):
    """The model, in evaluation mode, and its tokenizer. "auto": as saved; on a CPU, what it is fast in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place, kind = placed(device), precision(dtype)
    name = found(name)
    read_config(name)
    tokenizer = _checked(name, lambda: AutoTokenizer.from_pretrained(name))
    model: Any = _checked(name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=kind))
    if kind == "auto" and place.type == "cpu":
        from kvist.bench.memory import free
        from kvist.models.precision import suit

        model = suit(model, free(place))
    return model.to(place).eval(), tokenizer


def for_gradients(device: str, dtype: str) -> str:
    """--dtype of work that takes long and passes backward: on a CPU, fp32 where nothing is asked for."""
    return "float32" if dtype == "auto" and placed(device).type == "cpu" else dtype


def found(name: str) -> str:
    """What transformers is to load for MODEL; a GGUF file is converted first, and stderr is told."""
    from kvist.models.find import find

    return find(name, lambda text: print(f"kvist: {text}", file=sys.stderr))


def placed(device: str):
    """--device as a torch.device that can be used here."""
    import torch

    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device!r} cannot be used here: {_first(error)}") from None
    return place


def precision(dtype: str) -> Any:
    """--dtype as a torch.dtype; "auto" stays."""
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, found {dtype!r}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _checked(name: str, make):
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ValueError(f"expected a model's folder, GGUF file or Hub name, found no folder or file at {name}")
    if looks_local and not (path / "config.json").is_file():
        raise ValueError(f"{name} is no model: the folder has no config.json")
    try:
        return make()
    except Exception as error:  # transformers, safetensors and the Hub's client raise many kinds for a bad model
        raise ValueError(f"{name} cannot be read as a causal language model: {_first(error)}") from error


def _first(error: Exception) -> str:
    return next((line for line in str(error).strip().splitlines() if line), type(error).__name__)
