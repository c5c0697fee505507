"""Regenerates the marked parts of README.md and docs/measured.md.

    python dev/readme.py            write them
    python dev/readme.py --check    exit 1 when one of them is stale, write nothing

A part lies between `<!-- name -->` and `<!-- /name -->`. The catalogue comes from `kvist.methods`; the measured tables
come from the JSON files that the demo and the benchmark write. Where a JSON file is missing, what stands there stays.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kvist.methods import entry, get, names
from kvist.types import Geometry

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/measured.md")
SHAPE = Geometry(8, 128, 128, torch.bfloat16)
LENGTHS = {"4K": 4096, "128K": 131072}  # tokens
DEMO = ("runs/demo.json", "out/demo/results.json")  # the first that exists
DECODE = ("runs/decode.json",)
PICTURE = "docs/demo.png"
RELEASED = {"kvmix": "bits per layer; uniform where none are given"}  # what a method takes that has no default of its own


def catalogue() -> str:
    """Every registered method at its default settings."""
    rows = []
    for name in names():
        function, recipe = entry(name), get(name)
        file = Path(inspect.getsourcefile(function)).resolve()
        where = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else None
        bits = [f"{recipe.bits_per_element(SHAPE, 1, tokens):.2f}" for tokens in LENGTHS.values()]
        rows.append(
            [
                f"[`{name}`]({where})" if where else f"`{name}`",
                _paper(recipe.paper),
                *bits,
                RELEASED.get(name, "nothing"),
                inspect.getdoc(function).split("\n\n")[0].replace("\n", " ").replace("|", "\\|"),
            ]
        )
    head = ["method", "paper", *(f"bits at {label}" for label in LENGTHS), "needs", "what it does"]
    return _table(head, rows, "llrrll")


def demo() -> str | None:
    """The demo's table: one row per method."""
    found = _read(DEMO)
    if found is None:
        return None
    columns = {
        "method": lambda r: f"`{r['method']}`",
        "bits per element": lambda r: f"{r['bits_per_element']:.2f}",
        "cache KiB": lambda r: f"{_first(r, 'nbytes', 'cache_bytes') / 1024:,.0f}",
        "KL to exact": lambda r: f"{r['kl']:.4f}",
        "answers right": lambda r: f"{r['right']} of {r['asked']}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
    }
    rows = _first(found, "results", "rows") if isinstance(found, dict) else found
    return _table(list(columns), [[cell(row) for cell in columns.values()] for row in rows], "lrrrrr")


def decode() -> str | None:
    """The decode benchmark's table: one row per contender, one column per length."""
    found = _read(DECODE)
    if found is None:
        return None
    lengths = list(dict.fromkeys(row["tokens"] for row in found["rows"]))
    cells: dict[str, dict[int, str]] = {}
    for row in found["rows"]:
        text = "failed" if "failed" in row else f"{row['ms']:.2f} ({row['ratio']:.2f}x)"
        cells.setdefault(row["contender"], {})[row["tokens"]] = text
    head = ["contender", *(f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths)]
    rows = [[f"`{name}`", *(at.get(n, "") for n in lengths)] for name, at in cells.items()]
    machine = found["machine"]
    note = (
        f"Milliseconds per decode step, median, and the ratio to `dynamic`. {found['shape']}; {found['threads']} "
        f"thread{'s' * (found['threads'] != 1)}, {machine['processor']} ({machine['capability']}), torch "
        f"{machine['torch']}, transformers {machine['transformers']}."
    )
    return f"{note}\n\n{_table(head, rows, 'l' + 'r' * len(lengths))}"


def picture() -> str | None:
    """The demo's picture, once there is one."""
    if not (ROOT / PICTURE).exists():
        return None
    return f"![Quality against bytes of every method, measured by the demo]({PICTURE})"


PARTS: dict[str, Callable[[], str | None]] = {
    "generated: catalogue": catalogue,
    "measured: picture": picture,
    "measured: demo": demo,
    "measured: decode": decode,
}


def render(text: str, only: str | None = None) -> str:
    """A page with its parts made anew; `only` names the one part to make."""
    for name, make in PARTS.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        if opening not in text or (only and only != name):
            continue
        part = make()
        if part is not None:
            inside = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
            text = inside.sub(lambda _, part=part, a=opening, b=closing: f"{a}\n{part}\n{b}", text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 when --check found a stale page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when a part is stale; write nothing")
    check = parser.parse_args(arguments).check
    stale = []
    for page in PAGES:
        path = ROOT / page
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(page)
            if not check:
                path.write_text(new)
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


def _paper(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _table(head: list[str], rows: list[list[str]], align: str) -> str:
    rule = [{"l": ":--", "r": "--:"}[a] for a in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _read(candidates: tuple[str, ...]):
    path = next((ROOT / name for name in candidates if (ROOT / name).exists()), None)
    return None if path is None else json.loads(path.read_text())


def _first(row: dict, *keys: str):
    """The value under the first of `keys` that is there."""
    return next(row[key] for key in keys if key in row)


if __name__ == "__main__":
    sys.exit(main())
