"""Tables of what was measured of time and memory.

Each function gives a part of a page in Markdown, or None where its file is missing.
"""

from measured import machine, read, table

DECODE = ("runs/decode.json",)
PASSIVE = ("runs/decode-passive.json",)
STEPS = (("runs/steps.json",), ("runs/steps-8.json",))
ENCODE = ("runs/encode.json",)
MEMORY = ("runs/memory.json",)


def decode(where: tuple[str, ...] = DECODE) -> str | None:
    """The decode benchmark's table: one row per contender, one column per length."""
    found = read(where)
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
    note = f"{found['title']}. Median ms, and the ratio to the faster `dynamic`. {machine(found['machine'])}"
    return f"{note}\n\n{table(head, rows, 'l' + 'r' * (len(head) - 1))}"


def steps() -> str | None:
    """What a step of `generate` costs the host: a row per contender, columns for one row and for a padded batch."""
    found = [each for each in map(read, STEPS) if each is not None]
    if not found:
        return None
    names = [row["contender"] for row in found[0]["rows"]]
    cells = {(i, row["contender"]): row for i, each in enumerate(found) for row in each["rows"]}
    lines = [
        [
            f"`{name}`",
            *(f"{cells[i, name]['process ms']:.1f} ({cells[i, name]['x dynamic']:.2f}x)" for i in range(len(found))),
        ]
        for name in names
    ]
    head = [
        "cache",
        *(f"batch {each['rows'][0]['batch']}{', left-padded' if i else ''}" for i, each in enumerate(found)),
    ]
    note = (
        f"{found[0]['title']}. Process time per token, ms, and its ratio to `dynamic`. {machine(found[0]['machine'])}"
    )
    return f"{note}\n\n{table(head, lines, 'l' + 'r' * len(found))}"


def encode() -> str | None:
    """The encode benchmark's table: one row per method and side."""
    found = read(ENCODE)
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
    note = f"{found['title']}. {copied} {machine(found['machine'])}"
    return f"{note}\n\n{table(list(columns), rows, 'llrrrr')}"


def instructions() -> str | None:
    """Warp instructions per cached number, and the budget of each chip."""
    found = read(("runs/instructions.json",))
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
    found = read(("runs/gpu/kernels.json",))
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
    found = read((f"runs/throughput-{name}.json",))
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
    parts.append(f"{found['title']}; at most {limit}. {machine(found['machine'])}")
    parts.append(table(["contender", "batch", *columns], lines, "l" + "r" * (len(columns) + 1)))
    if largest:
        parts.append(f"Largest batch that was run before memory ended it: {', '.join(largest)}.")
    for claim in found.get("published", {}).get("claims", ()):
        ours = (f"{'not reached' if x is None else f'{x:.2f}x'} (`{who}`)" for who, x in claim["ours"].items())
        parts.append(f"- Published: {claim['published']}. Here: {', '.join(ours)}.")
    return "\n\n".join([*parts, *([found["published"]["differs"]] if "published" in found else [])])


def memory() -> str | None:
    """Measured bytes of one layer, and what follows for whole models."""
    found = read(MEMORY)
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
