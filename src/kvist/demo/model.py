"""The small model that comes with kvist: our own weights, in the wheel."""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("kvist-6m")


def load(dtype: str = "bfloat16") -> tuple[Any, Any]:
    """The bundled model, in evaluation mode, and its tokenizer. Nothing is downloaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=getattr(torch, dtype), local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
