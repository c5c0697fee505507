"""Files that a command is to read and write, checked before the hours and not after them."""

from pathlib import Path


def read(path: Path, what: str) -> str:
    """A text file. ValueError, which calls it `what`, where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"{what} {path} cannot be read: {reason}") from None


def check_folder(out: Path) -> None:
    """--out, a folder that may be made later."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is a folder, found a file at {out}")


def folder(out: Path) -> Path:
    """--out as a folder, made in one that is there."""
    check_folder(out)
    if not out.parent.is_dir():
        raise ValueError(f"expected a folder to make {out.name} in, found none at {out.parent}")
    out.mkdir(exist_ok=True)
    return out


def check_json(out: Path) -> None:
    """--out, a file of JSON."""
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out is a JSON file in a folder that is there, found {out}")


def check_parent(path: Path) -> None:
    """The folder of a file that is to be written."""
    if not path.parent.is_dir():
        raise ValueError(f"expected a folder to write {path.name} into, found none at {path.parent}")


def check_plot(path: Path | None) -> None:
    """--plot: can a picture be drawn there?"""
    if path is None:
        return
    if path.suffix != ".png":
        raise ValueError(f"a plot is a PNG file, found --plot {path}; give a name that ends in .png")
    check_parent(path)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install 'kvist[plot]'") from None
