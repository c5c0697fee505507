"""KVQuant's parts, one at a time: runs/kvquant.json, of the bundled model, plain and with planted outliers.

    python runs/kvquant.py plain --data-dir DIR     # also: mild, strong; each may be interrupted and goes on
    python runs/kvquant.py table                    # runs/kvquant.json from what was measured

Calibrated on training novels, scored on the WikiText-2 test text and on novels held out from training, in fp32.
"""

import argparse
import json
from pathlib import Path

import torch

from kvist import text
from kvist.artifact import Artifact, Fit, Settings
from kvist.atomic import replacing
from kvist.calibrate import tables
from kvist.calibrate.run import Observed, observe, origin
from kvist.calibrate.state import State
from kvist.coding import Table
from kvist.demo.model import load
from kvist.evaluate.contenders import Contender
from kvist.evaluate.results import Cell, Results, digest_of
from kvist.evaluate.suite import summary
from kvist.evaluate.task import Subject, run
from kvist.evaluate.tasks.fidelity import Perplexity
from kvist.evaluate.windows import Text
from kvist.methods import parse
from kvist.methods.kvquant import recipe
from kvist.models.inject import inject
from kvist.plan import Recipe
from kvist.types import Geometry

VARIANTS = ("plain", "mild", "strong")
SAMPLES, SEQLEN, WINDOWS, SEED = 8, 2048, 16, 0
OUT = Path("out/runs-kvquant")
HERE = Path(__file__).parent
SMALL, LARGE = Geometry(2, 64, 64, torch.bfloat16), Geometry(8, 128, 128, torch.bfloat16)

BASE = Settings(bits=3)
# what is looked at in the text: the base, and one thing changed
VIEWS = {
    "base": {},
    "dense": {"outliers": 0.0},
    "post-RoPE": {"keys": "post-rope"},
    "keys per token": {"key_axis": "token"},
    "keys per token, post-RoPE": {"key_axis": "token", "keys": "post-rope"},
    "keys per token, post-RoPE, dense": {"key_axis": "token", "keys": "post-rope", "outliers": 0.0},
    "no sink": {"sinks": 0},
    "F": {"sensitivity": "fisher"},
    "no sensitivity": {"sensitivity": "none"},
    "uncapped": {"cap": "none"},
}
# name of the row: the view, and what is fitted to it
ROWS: dict[str, tuple[str, dict]] = {
    **{f"nuq{b}-1%": ("base", {"bits": b}) for b in (4, 3, 2)},
    **{f"nuq{b}": ("dense", {"bits": b}) for b in (4, 3, 2)},
    **{f"nf{b}": ("dense", {"bits": b, "levels": "nf"}) for b in (4, 3, 2)},
    **{f"int{b}": ("dense", {"bits": b, "levels": "int"}) for b in (4, 3, 2)},
    "nf3-1%": ("base", {"levels": "nf"}),
    "int3-1%": ("base", {"levels": "int"}),
    **{
        f"nuq3-1%, {view}": (view, {})
        for view in ("post-RoPE", "keys per token", "keys per token, post-RoPE", "no sink", "F", "no sensitivity")
    },
    "nuq3-1%, uncapped": ("uncapped", {}),
    "int3, keys per token, post-RoPE": ("keys per token, post-RoPE, dense", {"levels": "int"}),
    "nuq2-1%, no Q-Norm": ("base", {"bits": 2, "qnorm": "off"}),
    "nuq2, no Q-Norm": ("dense", {"bits": 2, "qnorm": "off"}),
    "nuq2-1%, Q-Norm without weights": ("base", {"bits": 2, "weighted": False}),
    "nuq2-1%, F": ("F", {"bits": 2}),
    "nuq2-1%, no sink": ("no sink", {"bits": 2}),
    **{f"nuq{b}-1%, off the grid": ("base", {"bits": b, "grid": False}) for b in (4, 3, 2)},
}
STORED = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq3", "nuq2", "nuq3-1%, uncapped")
RECENT = {"nuq3-1%, recent 128": ("nuq3-1%", 128), "nuq2-1%, recent 128": ("nuq2-1%", 128)}
OTHERS = {"kivi:2": "kivi:2", "kivi:4": "kivi:4"}


def artifacts(model, tokenizer, variant: str, data_dir: str) -> dict[str, Artifact]:
    """The artefact of every row, made or read."""
    windows, digest = None, ""
    seen: dict[str, Observed] = {}
    found = {}
    for name, (view, changes) in ROWS.items():
        folder = OUT / variant / name.replace("%", "pc").replace(" ", "_")
        if not (folder / "artifact.json").exists():
            if windows is None:
                documents = text.texts("novels", data_dir, "train")
                windows, digest = text.sample(tokenizer, documents, SAMPLES, SEQLEN, SEED), text.digest(documents)
            if view not in seen:
                print(f"{variant}: {view}", flush=True)
                (OUT / variant / view.replace(" ", "_")).mkdir(parents=True, exist_ok=True)
                state = State(OUT / variant / view.replace(" ", "_"), f"{variant} {view}")
                seen[view] = observe(model, windows, BASE.model_copy(update=VIEWS[view]), state)
                state.save()
            _fitted(seen[view], changes, windows, digest).save(folder)
        found[name] = Artifact.load(folder)
    return found


def _fitted(observed: Observed, changes: dict, windows, digest: str) -> Artifact:
    settings = observed.settings.model_copy(update={k: v for k, v in changes.items() if k in Settings.model_fields})
    made = observed.fit(settings, changes.get("qnorm", "auto"), origin("novels", digest, SEED, windows))
    grid, weighted = changes.get("grid", True), changes.get("weighted", True)
    if grid and weighted:
        return made
    free = {}
    for side, histograms in (("keys", observed.keys), ("values", observed.values)):
        fits = []
        for fit, histogram in zip(getattr(made, side), histograms, strict=True):
            points = fit.table.points if grid else tables.fit(histogram, settings.bits)
            read = None
            if fit.table.read:
                scale, offset = tables.q_norm(histogram, points, weighted)
                read = tuple(scale * p + offset for p in points)
            fits.append(Fit(table=Table(bits=settings.bits, points=points, read=read), range=fit.range))
        free[side] = tuple(fits)
    return made.model_copy(update=free)


def measure(variant: str, data_dir: str) -> None:
    """All rows of one variant of the model, into lines of JSON."""
    model, tokenizer = load(dtype="float32")
    if variant != "plain":
        inject(model, variant, SEED)
    fitted = artifacts(model, tokenizer, variant, data_dir)
    simulated = {name: recipe(artifact) for name, artifact in fitted.items()} | {"exact": parse("exact")}
    stored = {name: simulated[name] for name in STORED} | {"exact": parse("exact")}
    stored |= {name: recipe(fitted[of], recent) for name, (of, recent) in RECENT.items()}
    stored |= {name: parse(method) for name, method in OTHERS.items()}
    results = Results(OUT / f"{variant}.jsonl")
    for source in ("wikitext2", "novels"):
        documents = text.texts(source, data_dir, "test")
        every = text.windows(tokenizer, documents, SEQLEN)
        step = len(every) // WINDOWS  # rows know windows by number: another step is another text
        chosen = Text(every[::step][:WINDOWS], source, f"{text.digest(documents)}/{step}")
        for mode, recipes in (("simulated", simulated), ("stored", stored)):
            print(f"{variant}: {source}, {mode}", flush=True)
            contenders = [Contender(name, made) for name, made in recipes.items()]
            run(Perplexity(chosen, mode), Subject.of(model, variant), contenders, results)
    with replacing(OUT / f"{variant}-facts.json") as scratch:
        scratch.write_text(json.dumps({name: _facts(made) for name, made in (simulated | stored).items()}))


def _facts(made: Recipe) -> dict:
    """The hash that its rows carry; allocated bits per element of a 16-bit model: this one at 2,048 tokens, and 8 KV
    heads of 128 at 32,768."""
    small = made.bits_per_element(SMALL, 6, SEQLEN)
    large = made.model_copy(update={"layers": made.layers[:1]}).bits_per_element(LARGE, 1, 32768)
    return {"recipe": digest_of(made), "bits": small, "bits_large": large}


def table() -> None:
    """Perplexity, KL and bits with paired intervals, per variant, text and mode."""
    rows = []
    for variant in VARIANTS:
        if not (OUT / f"{variant}-facts.json").exists():
            continue
        facts = json.loads((OUT / f"{variant}-facts.json").read_text())
        names = {fact["recipe"]: name for name, fact in facts.items()}  # whatever a recipe was called when measured
        kept = [cell for cell in Results(OUT / f"{variant}.jsonl").cells() if cell.first.digest in names]
        for source, mode in sorted({_text_of(cell) for cell in kept}):
            named: dict[str, Cell] = {}
            for cell in kept:
                name = names[cell.first.digest]
                wanted = mode == "simulated" or name in ("exact", *STORED, *RECENT, *OTHERS)
                if _text_of(cell) == (source, mode) and wanted:
                    named[name] = Cell(cell.rows, name)
            ordered = [named[name] for name in ("exact", *ROWS, *RECENT, *OTHERS) if name in named]
            for line in summary(ordered, "nuq3-1%", SEED):
                rows.append({"variant": variant, "text": source, "mode": mode} | line | facts[line["method"]])
    head = {"samples": SAMPLES, "seqlen": SEQLEN, "windows per text": WINDOWS, "seed": SEED, "paired with": "nuq3-1%"}
    with replacing(HERE / "kvquant.json") as scratch:
        scratch.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def _text_of(cell: Cell) -> tuple[str, str]:
    return cell.first.settings["source"], cell.first.settings["mode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*VARIANTS, "table"])
    parser.add_argument("--data-dir", help="a folder of data: train/novels.txt.xz, eval/novels.txt, eval/wikitext2")
    parser.add_argument("--threads", type=int, default=1, help="of torch; two variants may run side by side")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table() if given.what == "table" else measure(given.what, given.data_dir)


if __name__ == "__main__":
    main()
