"""Regenerates the marked parts of README.md and docs/measured.md.

    python dev/readme.py            write them
    python dev/readme.py --check    exit 1 when one of them is stale, write nothing

A part lies between `<!-- name -->` and `<!-- /name -->`. The catalogue comes from `kvist.methods`; the measured tables
come from the JSON files that the demo and the benchmark write. Where a JSON file is missing, what stands there stays.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import measured
import quality
import speed
import torch

from kvist.methods import entry, get, names
from kvist.types import Geometry

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/measured.md", "docs/kvquant.md", "docs/kvmix.md", "docs/evaluate.md", "docs/gpu.md")
SHAPE = Geometry(8, 128, 128, torch.bfloat16)
LENGTHS = {"4K": 4096, "128K": 131072}  # tokens
PICTURE = "runs/leaderboard/pareto.png"


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
                ", ".join(recipe.needs) or "nothing",
                _first_sentence(inspect.getdoc(function)),
            ]
        )
    head = ["method", "paper", *(f"bits at {label}" for label in LENGTHS), "needs", "what it does"]
    return measured.table(head, rows, "llrrll")


def picture() -> str | None:
    """The leaderboard's picture, once there is one."""
    if not (ROOT / PICTURE).exists():
        return None
    return f"![KL from the exact cache against stored bits, of every method, with its noise floor]({PICTURE})"


PARTS: dict[str, Callable[[], str | None]] = {
    "generated: catalogue": catalogue,
    "measured: picture": picture,
    "measured: answers": quality.answers,
    "measured: demo": quality.demo,
    "measured: bundled": lambda: quality.demo(quality.BUNDLED),
    "measured: decode": speed.decode,
    "measured: decode-passive": lambda: speed.decode(speed.PASSIVE),
    "measured: steps": speed.steps,
    "measured: encode": speed.encode,
    "measured: ablation": lambda: quality.ablation("simulated"),
    "measured: stored": lambda: quality.ablation("stored"),
    "measured: allocation": quality.allocation,
    "measured: ranking": quality.ranking,
    "measured: profiling": quality.profiling,
    "measured: kvmix-window": quality.kvmix_window,
    **{
        f"measured: throughput-{name}": lambda name=name: speed.throughput(name)
        for name in ("long", "kivi", "kvmix", "logquant")
    },
    "measured: memory": speed.memory,
    "measured: instructions": speed.instructions,
    "measured: gpu": speed.gpu,
    "measured: anatomy": quality.anatomy,
    "measured: windows": lambda: quality.demo(quality.WINDOWS),
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


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    end = words.find(". ")
    return (words if end < 0 else words[: end + 1]).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
