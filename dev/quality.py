"""Tables of what was measured of answers and errors.

Each function gives a part of a page in Markdown, or None where its file is missing.
"""

from measured import count, read, table

DEMO = ("runs/demo.json", "out/demo/results.json")  # the first that exists
BUNDLED = ("runs/demo-bundled.json",)
WINDOWS = ("runs/windows.json",)
SHOWN = ("exact", "kivi:4", "kvquant:3", "hadamard:4")  # whose answers are shown
ANATOMY = ("runs/anatomy.json",)
KVMIX = ("runs/kvmix.json",)
KVMIX_WINDOW = ("runs/kvmix-window.json",)
KVQUANT = ("runs/kvquant.json",)
VARIANTS = ("plain", "mild", "strong")


def demo(where: tuple[str, ...] = DEMO) -> str | None:
    """The demo's table: one row per method. Runs of earlier releases lack some columns."""
    found = read(where)
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
    documents = count(found["documents"], "document")
    lengths = " to ".join(dict.fromkeys(f"{found[name]:,}" for name in ("shortest", "longest")))
    note = (
        f"{found.get('model', 'bundled')}: {found['questions']} questions about {documents} of {lengths} tokens, seed "
        f"{found['seed']}; {count(found['threads'], 'thread')}, torch {found['torch']}, transformers "
        f"{found['transformers']}."
    )
    return f"{note}\n\n{table(list(columns), rows, 'l' + 'r' * (len(columns) - 1))}\n\n{found['caption']}"


def answers(where: tuple[str, ...] = DEMO) -> str | None:
    """The demo's answers to its open question, one above the other."""
    found = read(where)
    if found is None:
        return None
    rows = [row for row in found["results"] if row["method"] in SHOWN]
    width = max(len(row["method"]) for row in rows)
    lines = [f"{row['method']:<{width}}  {(row['answer'].splitlines() or ['(nothing)'])[0]}" for row in rows]
    return "\n".join(["```text", found["open"], "", *lines, "```"])


def ablation(mode: str) -> str | None:
    """KVQuant's parts one at a time: bits, then perplexity and KL per variant of the model, means of the two texts."""
    found = read(KVQUANT)
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
    found = read(KVMIX)
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
    found = read(KVMIX)
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
    found = read(KVMIX)
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
    found = read(KVMIX_WINDOW)
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
    found = read(ANATOMY)
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
