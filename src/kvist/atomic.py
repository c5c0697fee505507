"""Files written whole or not at all."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A scratch file beside `path`: it takes its place when the block ends well, and goes when it does not. Files that
    belong together are opened together: `with replacing(last) as a, replacing(first) as b`, all of them or none."""
    path = Path(path)
    writable(path)
    if not path.parent.is_dir():
        raise ValueError(f"expected a folder to write {path.name} into, found none at {path.parent}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part" + path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def writable(*paths: str | Path) -> None:
    """Refuse a folder in the place of any of these files, before the first is written."""
    for path in map(Path, paths):
        if path.is_dir():
            raise ValueError(f"expected a file to write at {path}, found a folder; move it away")


def write_json(path: str | Path, data) -> None:
    """JSON to read and edit by hand: indented, a list of numbers on one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    with replacing(path) as scratch:
        scratch.write_text(text + "\n")
