"""GGUF files become ordinary model folders: read by transformers, dequantized once, kept in the user's cache.

A folder is named by the file and the SHA-256 of its contents. It is made under another name and renamed when it is
whole, under a lock, so that a second process waits and an interrupted one leaves nothing that is taken for a model.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from kvist.models.gguf_header import Header, read_header

LAYOUT = "gguf-1"  # another number when a folder is made in another way
SUFFIX = ".gguf"


def hash_of(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def among(folder: Path) -> Path | None:
    """The GGUF file of a folder without a config.json; None where it has none. Several are named, and asked for."""
    if (folder / "config.json").is_file():
        return None
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
        raise ValueError(f"{folder} holds {len(files)} GGUF files: {names}; name one, such as {files[0]}")
    return files[0] if files else None


def converted(path: Path, cache: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """The model folder made of a GGUF file, in `cache`; made now where it is not there. `say` is told of work that
    takes a while. Raises ValueError with one sentence where the file cannot be used."""
    if find_spec("gguf") is None:
        raise ValueError("GGUF files are read by the package gguf, which is not installed: pip install 'kvist[gguf]'")
    if not path.is_file():
        raise ValueError(f"expected a GGUF file at {path}, found none")
    from filelock import FileLock

    name = f"{path.stem[:80]}-{hash_of(path)[:12]}"
    place = cache / LAYOUT
    folder = place / name
    if folder.is_dir():
        return folder
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / f".{name}.lock"):
        if folder.is_dir():
            return folder
        for left in place.glob(f".{name}.part*"):  # of a process that was killed: whoever holds the lock is alone
            shutil.rmtree(left, ignore_errors=True)
        say(f"converting {path.name} to 16 bits, once, into {folder}")
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{name}.part") as scratch:
            made = Path(scratch) / "model"
            try:
                _convert(path, made)
            except Exception as error:  # transformers, tokenizers and gguf raise many kinds for a bad file
                if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
                    raise
                words = next((line for line in str(error).strip().splitlines() if line), type(error).__name__)
                raise ValueError(f"{path} cannot be read as a model: {words}") from error
            made.rename(folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    """Write config, weights, generation config, tokenizer and chat template of a file as a model folder."""
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    header = read_header(path)
    config = AutoConfig.from_pretrained(**where)
    _check_size(config, header)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # Scales of blocks are fp16 numbers: as bf16, the weights would lose three bits that they have. Gemma's activations
    # outgrow fp16, and what was saved as bf16 stays so.
    wide = header.bfloat16 or header.architecture.startswith("gemma")
    model = _weights(where, torch.bfloat16 if wide else torch.float16)
    if not wide and not _finite(model):
        model = _weights(where, torch.bfloat16)
    if not _finite(model):
        raise ValueError("it has weights that are not finite numbers")
    if isinstance(end := model.generation_config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # which transformers 5.17 forgets
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_size(config, header: Header) -> None:
    """Refuse a config that asks for more numbers than the file has, before any memory is taken for them."""
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    missing = "tensors are missing, or its metadata is wrong; fetch it again"
    if text.num_hidden_layers > header.tensors:
        raise ValueError(f"it names {text.num_hidden_layers} layers but holds {header.tensors} tensors: {missing}")
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    outline.tie_weights()
    needed = sum(parameter.numel() for parameter in outline.parameters())
    if needed > header.elements:
        raise ValueError(f"its model needs {needed} numbers, its tensors hold {header.elements}: {missing}")


def _weights(where: dict, dtype):
    """The model in `dtype`, every weight from the file, without a trace of how it was stored."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvist.models import compat

    options = where | compat.dequantized() | {"dtype": dtype, "output_loading_info": True}
    read, told = AutoModelForCausalLM.from_pretrained(**options)
    wrong = sorted({*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])})
    if wrong:
        raise ValueError(f"tensors are missing or of a wrong shape: {', '.join(wrong[:4])}{', …' * (len(wrong) > 4)}")
    config, generation = read.config, read.generation_config
    vars(config).pop("quantization_config", None)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = generation
    return model


def _finite(model) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
