"""Made-up results that look like measured ones: many methods, two models, plain and with outliers, all tasks."""

import itertools
import json
import math
from pathlib import Path

import numpy as np

from kvist.evaluate.results import Row

# name: bits, KL, how much outliers hurt
METHODS = {
    "exact": (16.6, 0.0, 1),
    "kivi:2": (4.9, 0.18, 2),
    "kivi:4": (7.0, 0.004, 2),
    "kivi k=4 v=2": (5.9, 0.06, 2),
    "kvquant:2": (3.1, 0.2, 1.2),
    "kvquant:3": (4.1, 0.06, 1.2),
    "hadamard:2": (2.9, 0.6, 1.5),
    "hadamard:4": (5.05, 0.018, 1.5),
    "logquant:2": (5.5, 0.15, 2),
    "int4 (control)": (5.06, 0.0181, 30),
    "QuantizedCache quanto:2": (4.6, 0.4, 10),
}
FLOORS = {"floor: float16": 2e-4, "floor: batch 1": 3e-5}
MODELS = {"kvist-6m": 1.0, "bias-1to1-64": 1.6}
ALL = ("fidelity", "horizon", "needle", "multi-key", "gsm8k", "longbench:qasper", "nuisance", "ppl")
COMMON = {"metric": 1, "dtype": "bfloat16", "device": "cpu (2 threads)", "versions": {"kvist": "0.1.0", "torch": "2"}}


def rows(
    tasks=ALL, methods=tuple(METHODS), models=tuple(MODELS), stresses=("none", "strong"), items: int = 12, seed: int = 0
) -> list[Row]:
    """A row per method, task, model and stress; fidelity in two batches."""
    found = []
    for model in models:
        for stress in stresses:
            for task in tasks:
                hard = np.random.default_rng([seed, *map(ord, model + task)])
                difficulty = np.exp(hard.normal(0, 0.25, items))
                for name in [*(FLOORS if task == "fidelity" else ()), *methods]:
                    for part in ("both", "keys", "values"):
                        if part == "both" or (task == "fidelity" and _packs(name)):
                            found += _rows(task, name, part, model, stress, difficulty, seed)
    return found


def write(path: Path, some: list[Row]) -> Path:
    path.write_text("".join(row.line for row in some))
    return path


def row(task: str, method: str, values: dict, bits: float = 4.0, **more) -> Row:
    """One row by hand."""
    count = len(next(iter(values.values())))
    facts = COMMON | {"task": task, "settings": {"source": "novels"}, "model": "small-0123456789abcdef"}
    facts |= {"stress": "none", "method": method, "recipe": {"name": method}, "digest": method, "part": "both"}
    facts |= {"bits": bits, "items": tuple(range(count)), "values": values, "seconds": 1.0}
    return Row(**(facts | more))


def _packs(name: str) -> bool:
    return name in METHODS and name != "exact" and "Quantized" not in name


def _rows(task, name, part, model, stress, difficulty, seed) -> list[Row]:
    draws = np.random.default_rng([seed, *map(ord, model + stress + task + name + part)])
    bits, kl, hurt = METHODS.get(name, (16.6, FLOORS.get(name, 0.0), 1))
    kl *= MODELS[model] * (hurt if stress == "strong" else 1) * {"both": 1, "keys": 0.7, "values": 0.25}[part]
    per_item = kl * difficulty * np.exp(draws.normal(0, 0.06, len(difficulty)))
    values, settings = VALUES[task.split(":")[0]](per_item, draws)
    count = len(next(iter(values.values())))
    facts = COMMON | {"task": task, "settings": settings, "model": f"{model}-0123456789abcdef", "stress": stress}
    facts |= {"method": name, "part": part, "digest": f"{name}", "bits": bits}
    facts["recipe"] = {"name": name, "layers": [{"key": {"bits": 2, "group": 32}, "value": {"bits": 2, "group": 32}}]}
    cuts = (0, count // 2, count) if task == "fidelity" else (0, count)
    return [
        Row(
            **facts,
            items=tuple(range(a, b)),
            values={k: v[a:b] for k, v in values.items()},
            seconds=(b - a) * (0.2 + 0.1 * bits / 16 + 0.02 * float(draws.random())),
        )
        for a, b in itertools.pairwise(cuts)
    ]


def _fidelity(kl, draws):
    shape = np.linspace(0.6, 1.3, 16)
    curves = [(k * shape * np.exp(draws.normal(0, 0.1, 16))).tolist() for k in kl]
    count = [{str(math.floor(20 * math.log10(max(k * f, 1e-12)))): 512 for f in (0.1, 0.5, 1, 3)} for k in kl]
    values = {
        "kl": kl.tolist(),
        "nll": (2048 * (3.0 + kl)).tolist(),
        "tokens": [2048] * len(kl),
        "agreement": np.clip(1 - 0.5 * np.sqrt(kl), 0, 1).tolist(),
        "kl_max": (9 * kl).tolist(),
        "kl_counts": count,
        "kl_curve": curves,
        "inside": [[64, 0.0] for _ in kl],
        "beyond": [[1984, k] for k in kl],
        "last": [[512, 1.2 * k] for k in kl],
    }
    return values, {"source": "novels", "data": "ab12", "seqlen": 2048, "prompt": 0, "step": 32, "bucket": 128}


def _ppl(kl, draws):
    values = {"kl": kl.tolist(), "nll": (2048 * (3.2 + kl)).tolist(), "tokens": [2048] * len(kl)}
    values["agreement"] = (1 - 0.5 * np.sqrt(kl)).clip(0, 1).tolist()
    return values, {"source": "wikitext2", "data": "cd34", "seqlen": 2048, "mode": "stored", "prompt": 0}


def _horizon(kl, draws):
    shape = np.linspace(0.5, 1.4, 24)
    values = {
        "kl": kl.tolist(),
        "kl_curve": [(k * shape * np.exp(draws.normal(0, 0.1, 24))).tolist() for k in kl],
        "kl_at_once": [[[512, k, 0.8 * k], [1024, 1.2 * k, 0.8 * k * np.exp(draws.normal(0, 0.05))]] for k in kl],
        "first_mismatch": [int(min(128, 4 / max(k, 1e-9) + draws.integers(9))) for k in kl],
    }
    return values, {"source": "novels", "seqlen": 1536, "prompt": 0, "bucket": 64, "steps": 1536, "free_steps": 128}


def _recall(kl, draws, depths=(0.0, 0.25, 0.5, 0.75, 1.0), fraction=False):
    lengths, samples, values = (512, 1024, 1900), 6, {name: [] for name in ("score", "length", "depth")}
    luck = np.random.default_rng(7)
    for length in lengths:
        for depth in depths:
            for _ in range(samples):
                right = luck.random() < 0.97 - min(0.9, 1.1 * kl.mean() * (0.5 + length / 1900))
                values["score"].append(float(right) if not fraction else round(float(right) * luck.random(), 2))
                values["length"].append(length)
                values["depth"].append(depth)
    values["prediction"] = ["7" if score else "8" for score in values["score"]]
    values["expected"] = [["7"]] * len(values["score"])
    known = [depth for depth in depths if depth is not None]
    return values, {"source": "novels", "lengths": list(lengths), "depths": known, "samples": samples, "seed": 0}


def _answers(kl, draws):
    values, _ = _recall(kl, draws, (None,), True)
    return {name: values[name] for name in ("score", "prediction", "expected")}, {"shots": 5}


def _nuisance(kl, draws):
    own = {f"kl_{factor}": np.maximum(1e-5, 0.02 * kl * s).tolist() for factor, s in FACTORS.items()}
    shift = {f"shift_{factor}": (draws.normal(0, 0.01, len(kl)) * kl).tolist() for factor in FACTORS}
    return {"kl": kl.tolist(), **own, **shift}, {"source": "novels", "prompt": 512, "step": 32, "padding": 13}


FACTORS = {"padding": 1.0, "batch": 0.7, "chunk": 0.3}
VALUES = {
    "fidelity": _fidelity,
    "ppl": _ppl,
    "horizon": _horizon,
    "needle": _recall,
    "multi-key": lambda kl, draws: _recall(kl, draws, (None,)),
    "gsm8k": _answers,
    "longbench": _answers,
    "nuisance": _nuisance,
}


def bench(folder: Path) -> None:
    """Reports of speed as `kvist bench` writes them."""
    decode = [
        {"tokens": n, "contender": name, "median ms": f * n, "p10 ms": 0.9 * f * n, "p90 ms": 1.2 * f * n}
        for n in (1024, 4096, 16384)
        for name, f in {"dynamic": 2e-3, "kvist kivi:2": 8e-4, "quanto:2": 2.6e-3}.items()
    ]  # fmt: skip
    machine = {"processor": "some CPU", "threads": 2, "torch": "2"}
    (folder / "decode.json").write_text(
        json.dumps({"bench": "decode", "title": "One step", "machine": machine, "rows": decode})
    )
    speed = [
        {"contender": name, "method": name, "batch": b, "tokens/s": f * b**0.5, "cache bytes": 2**20 * b}
        for b in (1, 2, 4)
        for name, f in {"dynamic, SDPA": 7.0, "kivi:2": 9.0}.items()
    ]  # fmt: skip
    whole = {"bench": "throughput", "title": "Generations", "machine": machine, "settings": {}, "rows": speed}
    (folder / "throughput.json").write_text(json.dumps(whole))
    gates = [{"gate": "int4: stored at once = stored in updates", "holds": True, "found": "0 of 99 numbers differ"}]
    (folder / "gates.json").write_text(json.dumps({"bench": "gates", "rows": gates}))
