"""The set-ups in which papers measured throughput, what they published, and how ours differs."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from kvist.bench.shapes import SHAPES

PEAK_WITH_WEIGHTS, PEAK, BATCH, SPEED = "peak with weights", "peak", "batch", "tokens/s"


@dataclass(frozen=True)
class Claim:
    """What was published, in words, and the ratio of ours that stands beside it."""

    published: str
    ratio: str


@dataclass(frozen=True)
class Preset:
    """methods: what to call each method, and its text, for a number of layers."""

    shape: str
    prompt: int
    new: int
    methods: Callable[[int], dict[str, str]]
    claims: tuple[Claim, ...]
    differs: str


def kvmix(layers: int) -> dict[str, str]:
    """The published share: round(0.2 N) layers, at least one, at 3-bit keys and 4-bit values, all others at 2 bits.
    Here the first ones: which they are makes no difference to speed or bytes."""
    high = max(1, round(0.2 * layers))
    k, v = ([bits] * high + [2] * (layers - high) for bits in (3, 4))
    name = f"kvmix k{sum(k) / layers:.2f}v{sum(v) / layers:.2f}"
    text = f"kvmix k={','.join(map(str, k))} v={','.join(map(str, v))}"
    return {name: text, "kvmix:2": "kvmix:2"}


PRESETS = {
    "kivi": Preset(
        "llama-2-7b",
        160,
        338,
        lambda layers: {text: text for text in ("kivi:2", "kivi:4")},
        (
            Claim("2.6x lower peak memory, weights included", PEAK_WITH_WEIGHTS),
            Claim("up to 4x the batch", BATCH),
            Claim("2.35x to 3.47x the tokens/s", SPEED),
        ),
        "Theirs: one A100 of 80 GB, fp16 under Hugging Face's eager attention as the baseline, batch "
        "raised until memory ran out; ours: the baseline is the best of transformers' caches under SDPA, within "
        "--memory beyond the weights, random weights.",
    ),
    "kvmix": Preset(
        "llama-2-7b",
        688,
        1024,
        kvmix,
        (Claim("4.9x lower peak memory at batch 4, weights left out", PEAK), Claim("5.3x the tokens/s", SPEED)),
        "Theirs: an RTX 4090 of 24 GB, batch 30 against an fp16 baseline limited to batch 4, prompt "
        "tokens counted as throughput, one timed run; ours: random weights, and every cache grows its batch until "
        "--memory ends it (prompt tokens would raise both sides by the same factor).",
    ),
    "logquant": Preset(
        "llama-3-8b",
        257,
        1000,
        lambda layers: {text: text for text in ("logquant:2", "streaming:2", "kivi:2")},
        (Claim("25 % more tokens/s (1.25x)", SPEED), Claim("60 % more batch (1.6x)", BATCH)),
        "Theirs: Llama-3.1-8B, an H100, budget 128, bf16 baseline, peaks set by the logits of the whole prompt, the "
        "gain at batch 140 and slower below batch 16 to 32; ours: the same shapes with random weights, a window of "
        "64, logits of the last token only.",
    ),
}


def preset(name: str) -> Preset:
    """The preset of a name. Raises ValueError for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"no preset is called {name!r}{hint} there are {', '.join(PRESETS)}")
    return PRESETS[name]


def differences(chosen: Preset, settings: dict) -> str:
    """What sets our measurement apart from the paper's, what was changed in the preset included."""
    layers, lengths = SHAPES[chosen.shape][2], (settings["prompt tokens"], settings["new tokens"])
    changes = [] if settings["model"].startswith(chosen.shape) else [f"{settings['model']}, not {chosen.shape}"]
    changes += [] if settings["layers"] == layers else [f"{settings['layers']} layers, not {layers}"]
    if lengths != (chosen.prompt, chosen.new):
        changes.append(f"{lengths[0]} + {lengths[1]} tokens, not {chosen.prompt} + {chosen.new}")
    return chosen.differs + (f" Changed here: {'; '.join(changes)}." if changes else "")


def compare(claims: tuple[Claim, ...], report: dict) -> list[dict]:
    """Each claim with our ratio for each method, None where it was not measured.

    Peaks: at the largest batch that the method and a cache of transformers both ran, against the smallest of theirs.
    tokens/s: the best of any batch, prefill included. Batch: the largest measured; None where it was not memory
    that ended it.
    """
    rows = [row for row in report["rows"] if "tokens/s" in row]
    base, weights = [row for row in rows if not row["method"]], report["settings"]["weights bytes"]
    ended = {entry["contender"]: entry["ended by memory"] for entry in report["largest"]}
    limited = [entry for entry in report["largest"] if entry["contender"] in {row["contender"] for row in base}]

    def ratio(kind: str, mine: list[dict]) -> float | None:
        if not base or not mine:
            return None
        if kind == SPEED:
            return _most(mine, "tokens/s") / _most(base, "tokens/s")
        if kind == BATCH:
            by_memory = ended[mine[0]["contender"]] and all(entry["ended by memory"] for entry in limited)
            return _most(mine, "batch") / _most(base, "batch") if by_memory else None
        both = {row["batch"] for row in mine} & {row["batch"] for row in base}
        at = [[row["peak bytes"] for row in side if row["batch"] == max(both)] for side in (base, mine)] if both else []
        if not both or None in at[0] + at[1]:
            return None
        beside = weights if kind == PEAK_WITH_WEIGHTS else 0
        return (min(at[0]) + beside) / max(1, at[1][0] + beside)

    methods = dict.fromkeys(row["contender"] for row in rows if row["method"])
    groups = {name: [row for row in rows if row["contender"] == name] for name in methods}
    return [
        {"published": claim.published, "ours": {name: ratio(claim.ratio, mine) for name, mine in groups.items()}}
        for claim in claims
    ]


def _most(rows: list[dict], name: str) -> float:
    return max(row[name] for row in rows)
