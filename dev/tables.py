"""Tables of what was measured, from the JSON files that the demo, the benchmarks and runs/ write.

Each function gives a part of a page in Markdown, or None where its file is missing.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ("runs/demo.json", "out/demo/results.json")  # the first that exists
BUNDLED = ("runs/demo-bundled.json",)
SHOWN = ("exact", "kivi:4", "kvquant:3", "hadamard:4")  # whose answers are shown
DECODE = ("runs/decode.json",)
PASSIVE = ("runs/decode-passive.json",)
ENCODE = ("runs/encode.json",)
ANATOMY = ("runs/anatomy.json",)
KVMIX = ("runs/kvmix.json",)
KVMIX_WINDOW = ("runs/kvmix-window.json",)
KVQUANT = ("runs/kvquant.json",)
MEMORY = ("runs/memory.json",)
WINDOWS = ("runs/windows.json",)
VARIANTS = ("plain", "mild", "strong")


def demo(where: tuple[str, ...] = DEMO) -> str | None:
    """The demo's table: one row per method. Runs of earlier releases lack some columns."""
    found = _read(where)
    if found is None:
        return None
    small = found["results"][0]["nbytes"] < 10 * 2**20
    columns = {
        "method": ("method", lambda r: f"`{r['method']}`"),
        "bits used": ("used_bits", lambda r: f"{r['used_bits']:.2f}"),
        "at 8K": ("billed", lambda r: f"{r['billed']['8192']:.2f}"),
        "at 32K": ("billed", lambda r: f"{r['billed']['32768']:.2f}"),
        "bits": ("bits_per_element", lambda r: f"{r['bits_per_element']:.2f}"),
        "cache KiB" if small else "cache MiB": (
            "nbytes",
            lambda r: f"{r['nbytes'] / 2**10:,.0f}" if small else f"{r['nbytes'] / 2**20:.1f}",
        ),
        "KL, nats": ("kl", lambda r: "0" if r["kl"] < 1e-9 else f"{r['kl']:.2g}"),
        "top-1": ("agreement", lambda r: f"{r['agreement']:.1%}"),
        "facts found": ("right", lambda r: f"{r['right']} of {r['asked']}"),
        "tokens/s": ("tokens_per_second", lambda r: f"{r['tokens_per_second']:.1f}"),
    }
    if "used_bits" in found["results"][0]:
        del columns["bits"]
    columns = {name: cell for name, (key, cell) in columns.items() if key in found["results"][0]}
    rows = [[cell(row) for cell in columns.values()] for row in found["results"]]
    documents = _count(found["documents"], "document")
    lengths = " to ".join(dict.fromkeys(f"{found[name]:,}" for name in ("shortest", "longest")))
    note = (
        f"{found.get('model', 'bundled')}: {found['questions']} questions about {documents} of {lengths} tokens, seed "
        f"{found['seed']}; {_count(found['threads'], 'thread')}, torch {found['torch']}, transformers "
        f"{found['transformers']}."
    )
    return f"{note}\n\n{table(list(columns), rows, 'l' + 'r' * (len(columns) - 1))}\n\n{found['caption']}"


def answers(where: tuple[str, ...] = DEMO) -> str | None:
    """The demo's answers to its open question, one above the other."""
    found = _read(where)
    if found is None:
        return None
    rows = [row for row in found["results"] if row["method"] in SHOWN]
    width = max(len(row["method"]) for row in rows)
    lines = [f"{row['method']:<{width}}  {(row['answer'].splitlines() or ['(nothing)'])[0]}" for row in rows]
    return "\n".join(["```text", found["open"], "", *lines, "```"])


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
    return f"{note}\n\n{table(head, rows, 'l' + 'r' * (len(head) - 1))}"


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
    return f"{note}\n\n{table(list(columns), rows, 'llrrrr')}"


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
    return table(head, lines, "l" + "r" * (len(head) - 1))


def _both(text: dict[str, dict]) -> str:
    """KL on each text, with a mark where the paired interval of the difference excludes none."""
    cells = []
    for name in ("wikitext2", "novels"):
        row = text[name]
        low, high = (row["kl_difference"][end] for end in ("low", "high"))
        cells.append(f"{row['kl']['value']:.3f}{'' if low > 0 or high < 0 else ' ='}")
    return " / ".join(cells)


def allocation() -> str | None:
    """Who gets the bits: per group of equal stored bytes, KL per variant of the model and text."""
    found = _read(KVMIX)
    if found is None:
        return None
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in found["rows"])]
    head = ["group", "row", "bits at 2K", "keys, values"]
    head += [f"{what}, {name}" for name in variants for what in ("WikiText-2 ppl", "KL")]
    lines: dict[str, list[str]] = {}
    every = [row for row in found["rows"] if row["method"] != "exact"]
    for label in dict.fromkeys(_drawn(row) for row in every):
        own = [row for row in every if _drawn(row) == label]
        same = "k" in own[0] and all(row["k"] == own[0]["k"] and row["v"] == own[0]["v"] for row in own)
        widths = " ".join("".join(map(str, own[0][side])) for side in ("k", "v")) if same else ""
        cells = [*label.split(": "), f"{own[0]['bits']:.2f}", widths]
        for variant in variants:
            text = {}
            for row in own:
                if row["variant"] == variant:
                    text.setdefault(row["text"], []).append(row)
            perplexities = [row["perplexity"]["value"] for row in text["wikitext2"]]
            if len(perplexities) == 1:
                cells += [f"{perplexities[0]:.1f}", _both({name: rows[0] for name, rows in text.items()})]
            else:
                cells += [_spread(perplexities, 1), " / ".join(_spread(_kls(text[name]), 3) for name in text)]
        lines[label] = cells
    return table(head, list(lines.values()), "llrl" + "r" * (len(head) - 4))


def _drawn(row: dict) -> str:
    """A row's name; those of random layers share one."""
    group, name = row["method"].split(": ")
    return f"{group}: random layers, five seeds" if name.startswith("random") else row["method"]


def _kls(rows: list[dict]) -> list[float]:
    return [row["kl"]["value"] for row in rows]


def _spread(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ranking() -> str | None:
    """How well each score ranks layers, against the KL measured when one side of one layer is coded alone."""
    found = _read(KVMIX)
    if found is None:
        return None
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in found["ranking"]):
        for side, word in (("k", "keys"), ("v", "values")):
            cells = [variant, word]
            for score in ("gradient-norm", "loss-change"):
                for bits in (1, 2, 3):
                    own = [r for r in found["ranking"] if (r["variant"], r["side"], r["bits"]) == (variant, side, bits)]
                    cells.append(" / ".join(f"{row[score]:.2f}" for row in own))
            lines.append(cells)
    head = [
        "model",
        "side",
        *(f"{score}, {bits} bit" for score in ("gradient-norm", "loss-change") for bits in (1, 2, 3)),
    ]
    return table(head, lines, "llrrrrrr")


def profiling() -> str | None:
    """What a profile takes, against a pass per layer."""
    found = _read(KVMIX)
    if found is None:
        return None
    head = ["model", "profile, s", "a pass per layer, s", "ratio", "largest relative difference of norms"]
    lines = []
    for variant, cost in found["cost"].items():
        slow = found["prompts"] * cost["seconds of a pass per layer, per prompt"]
        numbers = [f"{cost['seconds']:.0f}", f"{slow:.0f}", f"{slow / cost['seconds']:.1f}"]
        lines.append([variant, *numbers, f"{cost['largest difference']:.0e}"])
    note = f"{found['prompts']} prompts of {found['tokens']:,} tokens, errors of five widths included, one thread."
    return f"{note}\n\n{table(head, lines, 'lrrrr')}"


def kvmix_window() -> str | None:
    """Exact tokens of KVmix's window, step by step."""
    found = _read(KVMIX_WINDOW)
    if found is None:
        return None
    steps = list(found["rows"][0]["exact tokens"])
    lines = []
    for row in found["rows"]:
        low, high = row["of the last 64 steps"]
        cells = [str(row["exact tokens"][step]) for step in steps]
        lines.append([f"{row['ratio']:.0%} of {row['ratio of']}", *cells, f"{low} to {high}"])
    head = ["window", *(f"step {step}" for step in steps), "last 64 steps"]
    return table(head, lines, "l" + "r" * (len(head) - 1))


def anatomy() -> str | None:
    """What makes the caches of the leaderboard's models hard to code."""
    found = _read(ANATOMY)
    if found is None:
        return None
    columns = {
        "attention on the first token": lambda seen: f"{seen['sink_mass']:.1%}",
        "heads with a sink": lambda seen: f"{seen['sink_heads']:.0%}",
        "keys: largest channel over median": lambda seen: f"{seen['keys_largest']:.1f}",
        "keys: most constant, std from zero": lambda seen: f"{seen['keys_offset']:.1f}",
        "values: largest channel over median": lambda seen: f"{seen['values_largest']:.1f}",
    }
    rows = [[name, *(cell(seen) for cell in columns.values())] for name, seen in found.items()]
    return table(["model", *columns], rows, "l" + "r" * len(columns))


def instructions() -> str | None:
    """Warp instructions per cached number, and the budget of each chip."""
    found = _read(("runs/instructions.json",))
    if found is None:
        return None
    chips = {f"sm_{arch}": chip["name"] for arch, chip in found["chips"].items()}
    rows = [
        [
            f"{row['arch']} ({chips[row['arch']]})",
            row["kernel"],
            str(row["bits"]),
            str(row["group"]),
            *(f"{row[name]:.2f}" for name in ("per number", "with rare", "budget")),
        ]
        for row in found["rows"]
        if "failed" not in row
    ]
    head = ["architecture", "kernel", "bits", "group", "per number", "with rare", "budget"]
    return table(head, rows, "llrrrrr")


def gpu() -> str | None:
    """Decode attention of one layer on a GPU: the best fp16 kernel, and ours with the ratio to it."""
    found = _read(("runs/gpu/kernels.json",))
    if found is None:
        return None
    timed = [row for row in found["rows"] if "median us" in row and "variant" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in timed))
    ours = list(dict.fromkeys(row["contender"] for row in timed if row["kind"] == "kvist"))
    cells = {}
    for row in timed:
        text = f"{row['median us']:,.1f}" if row["median us"] < 1000 else f"{row['median us']:,.0f}"
        cells[row["shape"], row["contender"]] = f"{text} ({row['x fp16']:.2f})"
    best = {
        shape: min(r["median us"] for r in timed if r["shape"] == shape and r["kind"] == "fp16") for shape in shapes
    }
    rows = [[shape, f"{best[shape]:.1f}", *(cells.get((shape, name), "") for name in ours)] for shape in shapes]
    head = ["query/KV heads:tokens", "best fp16", *(f"`{name.removeprefix('kvist ')}`" for name in ours)]
    note = (
        f"{found['title']}, torch {found['machine']['torch']}: µs, and how many times faster than the best fp16 kernel "
        f"of the same run. A plain read reaches {found['read GB/s']:,.0f} GB/s."
    )
    return f"{note}\n\n{table(head, rows, 'l' + 'r' * (len(head) - 1))}"


def throughput(name: str) -> str | None:
    """Whole generations: a row per contender and batch, the largest batches, and what was published."""
    found = _read((f"runs/throughput-{name}.json",))
    if found is None:
        return None
    columns = {
        "tokens/s": ("tokens/s", 1, 1),
        "decode tokens/s": ("decode tokens/s", 1, 1),
        "first token, s": ("first token s", 1, 2),
        "cache MiB": ("cache bytes", 2**20, 1),
        "peak MiB": ("peak bytes", 2**20, 0),
    }
    lines = []
    for row in found["rows"]:
        if "tokens/s" in row:
            cells = [f"{row[key] / unit:,.{digits}f}" for key, unit, digits in columns.values()]
        else:
            cells = [row.get("not run") or "failed", *[""] * (len(columns) - 1)]
        lines.append([f"`{row['contender']}`", str(row["batch"]), *cells])
    settings, parts = found["settings"], []
    largest = [
        f"`{each['contender']}` {each['measured']}"
        + (f" (by the line {each['by the line through the peaks']})" if each["by the line through the peaks"] else "")
        for each in found["largest"]
        if each["ended by memory"]
    ]
    limit = f"{settings['memory bytes'] / 2**20:,.0f} MiB beside {settings['weights bytes'] / 2**30:.2f} GiB of weights"
    parts.append(f"{found['title']}; at most {limit}. {_machine(found['machine'])}")
    parts.append(table(["contender", "batch", *columns], lines, "l" + "r" * (len(columns) + 1)))
    if largest:
        parts.append(f"Largest batch that was run before memory ended it: {', '.join(largest)}.")
    for claim in found.get("published", {}).get("claims", ()):
        ours = (f"{'not reached' if x is None else f'{x:.2f}x'} (`{who}`)" for who, x in claim["ours"].items())
        parts.append(f"- Published: {claim['published']}. Here: {', '.join(ours)}.")
    return "\n\n".join([*parts, *([found["published"]["differs"]] if "published" in found else [])])


def memory() -> str | None:
    """Measured bytes of one layer, and what follows for whole models."""
    found = _read(MEMORY)
    if found is None:
        return None
    rows = [
        [f"`{r['method']}`", f"{r['bytes']:,}", f"{r['bits per element']:.3f}", f"{r['MB/s of 16-bit input']:.0f}"]
        for r in found["measured"]
    ]
    measured = table(["method", "bytes", "bits per element", "MB/s of 16-bit input"], rows, "lrrr")
    rows = [[*_sizes(r), r["published"]] for r in found["claims"]]
    head = ["method", "tokens", "cache, GiB", "with 13.5 GB of weights, GiB", "published"]
    claims = table(head, rows, "lrrrl")
    rows = [[*_sizes(r), f"{r['80 GB cards']:.0f}"] for r in found["Llama-3-8B"]]
    head = ["method", "tokens", "cache, GiB", "with 16.1 GB of weights, GiB", "cards of 80 GiB, at least"]
    return f"{found['title']}.\n\n{measured}\n\n{claims}\n\nLlama-3-8B shapes:\n\n{table(head, rows, 'lrrrr')}"


def _sizes(row: dict) -> list[str]:
    sizes = [f"{row[name]:.1f}" for name in ("cache GiB", "with weights GiB")]
    return [f"`{row['method']}`", f"{row['tokens']:,}", *sizes]


def table(head: list[str], rows: list[list[str]], align: str) -> str:
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
