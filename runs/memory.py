"""What a cache of LLaMA-7B shapes takes at 128K tokens, measured, and what follows from it: runs/memory.json.

    python runs/memory.py

One layer, 32 heads of 128, random numbers, on the CPU. Everything else is arithmetic on these bytes, and says so.
"""

import json
import time
from pathlib import Path

import torch

from kvist.atomic import replacing
from kvist.bench.table import machine
from kvist.cache.layer import Layer
from kvist.cache.report import measure
from kvist.cache.rows import Rows
from kvist.methods import parse
from kvist.testing.stand_in import stand_in
from kvist.types import Geometry

LLAMA_7B = {"layers": 32, "heads": 32, "dim": 128, "weights": 13.5e9}
LLAMA3_8B = {"layers": 32, "heads": 8, "dim": 128, "weights": 16.1e9}
TOKENS, CHUNK = 131072, 2048
GIB = 2**30
CARD = 80 * GIB  # what a card sold as 80 GB has
METHODS = ("kvquant:3", "kvquant:2", "kvquant:2 outliers=0", "kvquant:3 outliers=0", "kvquant:4")
# method, tokens, and what the paper or its repository says, in its words' unit
CLAIMS = (
    ("kvquant:3", 512 * 1024, "LLaMA-7B, 512K tokens at 3 bits and 1 % on one 80 GB card (repository)"),
    ("kvquant:2 outliers=0", 1 << 20, "LLaMA-7B, 1M tokens at dense 2 bits: 64 GiB of cache on one 80 GB card"),
    ("kvquant:2", 1 << 20, "74 GiB at 2 bits and 1 %: not on one card together with the weights"),
)


def stored(method: str) -> dict:
    """Bytes of one layer that holds 128K random tokens, all room counted, and the seconds that it took."""
    torch.manual_seed(0)
    heads, dim = LLAMA_7B["heads"], LLAMA_7B["dim"]
    recipe, rows = stand_in(parse(method), heads, dim), Rows()
    layer, start = Layer(recipe.layers[0], recipe.page, recipe.prefill, TOKENS, rows), time.perf_counter()
    spent = 0.0
    for _ in range(0, TOKENS, CHUNK):
        keys, values = (torch.randn(1, heads, CHUNK, dim).bfloat16() for _ in range(2))
        start = time.perf_counter()
        rows.extend(1, CHUNK, None)
        layer.update(keys, values)
        spent += time.perf_counter() - start
    found = measure(method, [layer])
    shape = Geometry(heads, dim, dim, torch.bfloat16)
    billed = recipe.bill(shape, 1, TOKENS, reserve=TOKENS).total()
    return {
        "method": method,
        "tokens": TOKENS,
        "bytes": found.nbytes,
        "billed bytes": billed,
        "bits per element": found.bits_per_element,
        "seconds": spent,
        "MB/s of 16-bit input": 2 * 2 * TOKENS * heads * dim / spent / 1e6,
        "items": found.allocated,
    }


def arithmetic(method: str, model: dict, tokens: int) -> dict:
    """Bytes of all layers at a length, from the bill."""
    heads, dim = model["heads"], model["dim"]
    recipe = stand_in(parse(method), heads, dim)
    shape = Geometry(heads, dim, dim, torch.bfloat16)
    cache = recipe.bill(shape, model["layers"], tokens, reserve=tokens).total()
    total = cache + model["weights"]
    sizes = {"cache GiB": cache / GIB, "with weights GiB": total / GIB}
    return {"method": method, "tokens": tokens, **sizes, "80 GB cards": -(-total // CARD)}


def main() -> None:
    measured = []
    for method in METHODS:
        measured.append(stored(method))
        print(measured[-1], flush=True)
    lengths = (1 << 20, 10 << 20)
    report = {
        "title": "One layer of LLaMA-7B shapes (32 heads of 128) at 128K tokens, measured; the rest is arithmetic",
        "machine": machine(),
        "measured": measured,
        "claims": [{**arithmetic(method, LLAMA_7B, n), "published": said} for method, n, said in CLAIMS],
        "Llama-3-8B": [arithmetic(method, LLAMA3_8B, n) for n in lengths for method in METHODS],
        "left out": "activations, logits, the allocator's slack and the CUDA context: the paper's arithmetic, too",
    }
    with replacing(Path(__file__).parent / "memory.json") as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: report[k] for k in ("claims", "Llama-3-8B")}, indent=1))


if __name__ == "__main__":
    main()
