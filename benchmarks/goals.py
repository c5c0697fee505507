"""What the kernels are to reach on a GPU, and whether they did: goals, measured numbers, met or not."""

from collections.abc import Callable, Iterable

from benchmarks.kernel_storage import Shape

FORMATS = {
    "4 bit g128": "kivi:4 group=128",
    "4 bit g32": "kivi:4",
    "3 bit": "kivi:3 group=64",
    "2 bit g128": "kivi:2 group=128",
    "2 bit g32": "kivi:2",
}
POST, PRE = "kvquant:4 keys=post-rope outliers=0", "kvquant:4"
Where = Callable[[Shape], bool]
Reports = dict[str, dict]


def _mha(shape: Shape) -> bool:
    return shape.heads == shape.query_heads == 32 and shape.tokens >= 1 << 17


def _gqa(shape: Shape) -> bool:
    return (shape.query_heads, shape.heads) == (32, 8) and shape.tokens >= 1 << 19


def _gqa_alone(shape: Shape) -> bool:
    return (shape.query_heads, shape.heads, shape.length, shape.batch) == (32, 8, 1 << 17, 1)


def _short(shape: Shape) -> bool:
    return (shape.query_heads, shape.heads, shape.length, shape.batch) == (32, 8, 4096, 1)


def _large(shape: Shape) -> bool:
    return _mha(shape) or _gqa(shape)


def _long(shape: Shape) -> bool:
    return shape.tokens >= 1 << 17


# what holds for batch x context of some shapes: ratios to the best fp16, by format
RATIOS: tuple[tuple[str, Where, tuple[float, ...]], ...] = (
    ("MHA 32/32, 128K tokens and more", _mha, (2.9, 2.5, 3.4, 5.0, 4.0)),
    ("GQA 32/8, 512K tokens and more", _gqa, (2.8, 2.4, 3.2, 4.5, 3.7)),
    ("GQA 32/8, 128K, batch 1", _gqa_alone, (2.7, 2.3, 2.8, 3.8, 3.2)),
    ("GQA 32/8, 4K, batch 1", _short, (1.1, 1.1, 1.1, 1.1, 1.1)),
    ("least: 128K tokens and more", _long, (2.0, 2.0, 2.0, 2.5, 2.5)),
)
FP8 = (("4 bit g128", 1.5), ("4 bit g32", 1.3), ("2 bit g128", 2.3), ("2 bit g32", 2.0))


def judge(reports: Reports) -> list[dict]:
    """A row per goal: what was wanted, the worst that was measured, and whether it is met; "not measured" where it was
    not. reports: of the stages of `benchmarks.gpu`, by name."""
    timed = _rows(reports, "kernels")
    rows = []
    for name, where, wanted in RATIOS:
        for (form, method), ratio in zip(FORMATS.items(), wanted, strict=True):
            rows.append(_least(f"{name}: {form}, x fp16", ratio, _found(timed, method, where, "x fp16")))
    rows.append(_least("nuq4 post-RoPE, large: x fp16", 2.8, _found(timed, POST, _large, "x fp16")))
    rows.append(_least("nuq4 pre-RoPE + 1 % outliers, large: x fp16", 2.0, _found(timed, PRE, _large, "x fp16")))
    for form, ratio in FP8:
        rows.append(_least(f"{form}, large: x FP8", ratio, _found(timed, FORMATS[form], _large, "x fp8")))
    packing = [row["x copy"] for row in reports.get("variants", {}).get("packing", ()) if "x copy" in row]
    rows.append(_least("packing: x copy", 0.6, packing))
    for variant, most, name in (("shuffled", 1.03, "pages anywhere"), ("ragged", 1.10, "ragged batch")):
        slower = [row["x in order"] for row in _rows(reports, "variants") if _is(row, variant) and "x in order" in row]
        rows.append(_most(f"{name}: time, x pages in order", most, slower))
    rows.append(_least("plain generate: x DynamicCache", 1.0, _of(reports, "generate", "x dynamic", ours=True)))
    rows.append(_least("captured step: share of the saving", 0.8, _of(reports, "captured", "share")))
    for name, tokens in (("llama-2-7b", 1 << 20), ("llama-3-8b", 1 << 22)):
        held = [row["tokens"] for row in _rows(reports, "headline") if row.get("model") == name and "tokens/s" in row]
        rows.append(_least(f"tokens of 2 bits, {name}", tokens, held))
    angles = reports.get("headline", {}).get("angles", {})
    rows.append(_most("rotary angles at 2^20: rad off", 1e-3, [angles["kvist"]] if "kvist" in angles else []))
    return rows


def page(rows: list[dict], reports: Reports) -> str:
    """Goals and kernel times as Markdown, from whatever was measured so far."""
    lines = ["# Measured on a GPU", "", "| goal | wanted | measured | met |", "|:--|:--|--:|:--|"]
    lines += [f"| {row['goal']} | {row['wanted']} | {row['measured']} | {row['met']} |" for row in rows]
    timed = [row for row in _rows(reports, "kernels") if "median us" in row]
    if timed:
        lines += ["", "| shape | contender | kernel | µs | x fp16 | GB/s |", "|:--|:--|:--|--:|--:|--:|"]
    for row in timed:
        ratio = f"{row['x fp16']:.2f}" if "x fp16" in row else ""
        lines.append(
            f"| {row['shape']} | {row['contender']} | `{row['kernel'][:40]}` | {row['median us']:.1f} | {ratio} "
            f"| {row['GB/s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _rows(reports: Reports, stage: str) -> list[dict]:
    return reports.get(stage, {}).get("rows", [])


def _is(row: dict, variant: str) -> bool:
    return row.get("variant") == variant


def _found(rows: Iterable[dict], method: str, where: Where, name: str) -> list[float]:
    mine = (row for row in rows if row.get("contender") == f"kvist {method}" and name in row and "variant" not in row)
    return [row[name] for row in mine if where(Shape.parse(row["shape"]))]


def _of(reports: Reports, stage: str, name: str, ours: bool = False) -> list[float]:
    rows = (row for row in _rows(reports, stage) if row.get(name) is not None)
    return [row[name] for row in rows if not ours or row["contender"].startswith("kvist")]


def _least(name: str, wanted: float, found: list[float]) -> dict:
    return _judged(name, f"at least {wanted:.8g}", min(found, default=None), lambda x: x >= wanted)


def _most(name: str, wanted: float, found: list[float]) -> dict:
    return _judged(name, f"at most {wanted:.8g}", max(found, default=None), lambda x: x <= wanted)


def _judged(name: str, wanted: str, found: float | None, met: Callable[[float], bool]) -> dict:
    if found is None:
        return {"goal": name, "wanted": wanted, "measured": "", "met": "not measured"}
    return {
        "goal": name,
        "wanted": wanted,
        "measured": f"{found:.8g}" if found > 1e4 else f"{found:.3g}",
        "met": "yes" if met(found) else "no",
    }
