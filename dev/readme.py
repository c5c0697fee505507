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
PAGES = ("README.md", "docs/measured.md", "docs/kvquant.md")
SHAPE = Geometry(8, 128, 128, torch.bfloat16)
LENGTHS = {"4K": 4096, "128K": 131072}  # tokens
DEMO = ("runs/demo.json", "out/demo/results.json")  # the first that exists
DECODE = ("runs/decode.json",)
PASSIVE = ("runs/decode-passive.json",)
ENCODE = ("runs/encode.json",)
KVQUANT = ("runs/kvquant.json",)
MEMORY = ("runs/memory.json",)
WINDOWS = ("runs/windows.json",)
VARIANTS = ("plain", "mild", "strong")
PICTURE = "docs/demo.png"


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
    return _table(head, rows, "llrrll")


def demo(where: tuple[str, ...] = DEMO) -> str | None:
    """The demo's table: one row per method."""
    found = _read(where)
    if found is None:
        return None
    columns = {
        "method": lambda r: f"`{r['method']}`",
        "bits per element": lambda r: f"{r['bits_per_element']:.2f}",
        "cache KiB": lambda r: f"{r['nbytes'] / 1024:,.0f}",
        "KL to exact, nats": lambda r: f"{r['kl']:.2g}",
        "answers right": lambda r: f"{r['right']} of {r['asked']}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
    }
    rows = [[cell(row) for cell in columns.values()] for row in found["results"]]
    note = (
        f"{found['questions']} questions about {found['documents']} documents of {found['shortest']} to "
        f"{found['longest']} tokens, seed {found['seed']}; {_count(found['threads'], 'thread')}, "
        f"torch {found['torch']}, transformers {found['transformers']}."
    )
    return f"{note}\n\n{_table(list(columns), rows, 'lrrrrr')}\n\n{found['caption']}"


def decode(where: tuple[str, ...] = DECODE) -> str | None:
    """The decode benchmark's table: one row per contender, one column per length."""
    found = _read(where)
    if found is None:
        return None
    lengths = list(dict.fromkeys(row["tokens"] for row in found["rows"]))
    cells: dict[str, dict[int, str]] = {}
    room: dict[str, str] = {}
    for row in found["rows"]:
        text = "failed" if "failed" in row else f"{row['median ms']:.2f} ({row['x dynamic']:.2f}x)"
        cells.setdefault(row["contender"], {})[row["tokens"]] = text
        if row["tokens"] == lengths[-1] and "failed" not in row:
            room[row["contender"]] = f"{row['cache MiB']:.1f}"
    labels = [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths]
    head = ["contender", *labels, f"cache MiB at {labels[-1]}"]
    rows = [[f"`{name}`", *(at.get(n, "") for n in lengths), room.get(name, "")] for name, at in cells.items()]
    note = f"{found['title']}. Median ms, and the ratio to the faster `dynamic`. {_machine(found['machine'])}"
    return f"{note}\n\n{_table(head, rows, 'l' + 'r' * (len(head) - 1))}"


def encode() -> str | None:
    """The encode benchmark's table: one row per method and side."""
    found = _read(ENCODE)
    if found is None:
        return None
    columns = {
        "method": "method",
        "side": "side",
        "MB/s of input": "MB/s",
        "ratio to a copy": "x copy",
        "page, µs": "page us",
        "one token, µs": "token us",
    }
    digits = {"MB/s": 0, "x copy": 3, "page us": 0, "token us": 0}
    rows = [
        [
            f"{row[key]:,.{digits[key]}f}" if key in digits and key in row else str(row.get(key, ""))
            for key in columns.values()
        ]
        for row in found["rows"]
    ]
    copied = f"A copy of the same bytes runs at {found['copy MB/s']:,.0f} MB/s."
    note = f"{found['title']}. {copied} {_machine(found['machine'])}"
    return f"{note}\n\n{_table(list(columns), rows, 'llrrrr')}"


def ablation(mode: str) -> str | None:
    """KVQuant's parts one at a time: bits, then perplexity and KL per variant of the model, means of the two texts."""
    found = _read(KVQUANT)
    if found is None:
        return None
    rows = [row for row in found["rows"] if row["mode"] == mode]
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    names = list(dict.fromkeys(row["method"] for row in rows))
    head = ["row", "bits, this model at 2K", "bits, 8 x 128 at 32K"]
    head += [f"{what}, {name}" for name in variants for what in ("WikiText-2 ppl", "KL")]
    lines = []
    for name in names:
        own = [row for row in rows if row["method"] == name]
        elsewhere = "" if "uncapped" in name else f"{own[0]['bits_large']:.2f}"  # its slots were counted on this model
        cells = [f"{name}", f"{own[0]['bits']:.2f}", elsewhere]
        for variant in variants:
            text = {row["text"]: row for row in own if row["variant"] == variant}
            cells += [f"{text['wikitext2']['perplexity']['value']:.1f}", _both(text)]
        lines.append(cells)
    return _table(head, lines, "l" + "r" * (len(head) - 1))


def _both(text: dict[str, dict]) -> str:
    """KL on each text, with a mark where the paired interval of the difference excludes none."""
    cells = []
    for name in ("wikitext2", "novels"):
        row = text[name]
        low, high = (row["kl_difference"][end] for end in ("low", "high"))
        cells.append(f"{row['kl']['value']:.3f}{'' if low > 0 or high < 0 else ' ='}")
    return " / ".join(cells)


def memory() -> str | None:
    """Measured bytes of one layer, and what follows for whole models."""
    found = _read(MEMORY)
    if found is None:
        return None
    rows = [
        [f"`{r['method']}`", f"{r['bytes']:,}", f"{r['bits per element']:.3f}", f"{r['MB/s of 16-bit input']:.0f}"]
        for r in found["measured"]
    ]
    measured = _table(["method", "bytes", "bits per element", "MB/s of 16-bit input"], rows, "lrrr")
    rows = [
        [
            f"`{r['method']}`",
            f"{r['tokens']:,}",
            f"{r['cache GiB']:.1f}",
            f"{r['with weights GiB']:.1f}",
            r["published"],
        ]
        for r in found["claims"]
    ]
    head = ["method", "tokens", "cache, GiB", "with 13.5 GB of weights, GiB", "published"]
    claims = _table(head, rows, "lrrrl")
    rows = [[*_sizes(r), r["published"]] for r in found["claims"]]
    head = ["method", "tokens", "cache, GiB", "with 13.5 GB of weights, GiB", "published"]
    claims = _table(head, rows, "lrrrl")
    rows = [[*_sizes(r), f"{r['80 GB cards']:.0f}"] for r in found["Llama-3-8B"]]
    head = ["method", "tokens", "cache, GiB", "with 16.1 GB of weights, GiB", "cards of 80 GiB, at least"]
    return f"{found['title']}.\n\n{measured}\n\n{claims}\n\nLlama-3-8B shapes:\n\n{_table(head, rows, 'lrrrr')}"


def _sizes(row: dict) -> list[str]:
    sizes = [f"{row[name]:.1f}" for name in ("cache GiB", "with weights GiB")]
    return [f"`{row['method']}`", f"{row['tokens']:,}", *sizes]


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
    "measured: decode-passive": lambda: decode(PASSIVE),
    "measured: encode": encode,
    "measured: ablation": lambda: ablation("simulated"),
    "measured: stored": lambda: ablation("stored"),
    "measured: memory": memory,
    "measured: windows": lambda: demo(WINDOWS),
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


def _table(head: list[str], rows: list[list[str]], align: str) -> str:
    rule = [{"l": ":--", "r": "--:"}[a] for a in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _read(candidates: tuple[str, ...]):
    path = next((ROOT / name for name in candidates if (ROOT / name).exists()), None)
    return None if path is None else json.loads(path.read_text())


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _machine(found: dict) -> str:
    return (
        f"{found['processor']} ({found['capability']}), {_count(found['threads'], 'thread')}, "
        f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}."
    )


if __name__ == "__main__":
    sys.exit(main())
