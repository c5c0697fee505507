"""Who should get the bits: runs/kvmix.json, of the bundled model, plain and with planted outliers.

    python runs/kvmix.py plain --data-dir DIR     # also: mild, strong; each may be interrupted and goes on
    python runs/kvmix.py table                    # runs/kvmix.json from what was measured

Profiled on training novels, scored on the WikiText-2 test text and on novels held out from training, in fp32. All rows
of a group take the same stored bits: the same widths on other layers, or a budget of the same bytes.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from kvist import text
from kvist.allocation import Allocation, rules
from kvist.atomic import replacing, write_json
from kvist.calibrate import budget
from kvist.calibrate.profile import SIDES, Profile, spearman
from kvist.calibrate.sensitivity import profile
from kvist.demo.model import load
from kvist.evaluate.contenders import Contender
from kvist.evaluate.results import Cell, Results, digest_of
from kvist.evaluate.suite import summary
from kvist.evaluate.task import Subject, run
from kvist.evaluate.tasks.fidelity import Perplexity
from kvist.evaluate.windows import Text
from kvist.methods import get, parse
from kvist.models.inject import inject
from kvist.models.projections import projections
from kvist.plan import Recipe

VARIANTS = ("plain", "mild", "strong")
METHOD = "kivi recent=32"  # the same window on all layers, so that equal widths are equal bytes
CHOICES, ALONE_BITS = (1, 2, 3, 4, 8), (1, 2, 3)
PROMPTS, LENGTH, SEQLEN, SEED = 30, 1024, 2048, 0
WINDOWS, ALONE = {"wikitext2": 16, "novels": 8}, 4
OUT, HERE = Path("out/runs-kvmix"), Path(__file__).parent


def scored(model, tokenizer, variant: str, data_dir: str) -> Profile:
    """The variant's profile, made or read, with the time it took and that of a pass per layer."""
    path = OUT / variant / "profile.json"
    if not path.exists():
        prompts, digest = text.draw(tokenizer, "novels", data_dir, PROMPTS, LENGTH, SEED)
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        profile(model, prompts, {METHOD: CHOICES}, source="novels", digest=digest, seed=SEED, out=path)
        seconds = time.perf_counter() - start
        found = _pass_per_layer(model, prompts[:3]) | {"seconds": seconds, "threads": torch.get_num_threads()}
        norms = Profile.load(path).gradient_norm
        pairs = [(getattr(norms, side)[i][:3], found["norms"][side][i]) for side in SIDES for i in range(6)]
        found["largest difference"] = max(abs(a / b - 1) for x, y in pairs for a, b in zip(x, y, strict=True))
        write_json(path.with_name("cost.json"), found)
    return Profile.load(path)


def _pass_per_layer(model, prompts) -> dict:
    """The published way: per prompt and layer a forward pass and a backward pass for each of the two weights."""
    sources, start = projections(model), time.perf_counter()
    norms: dict = {side: [[] for _ in sources] for side in SIDES}
    for ids in prompts:
        for layer, pair in enumerate(sources):
            for source in pair:
                source.module.weight.requires_grad_(True)
            logits = model(ids.unsqueeze(0), use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1].float(), ids[1:])
            for side, source in zip(SIDES, pair, strict=True):
                (gradient,) = torch.autograd.grad(loss, source.module.weight, retain_graph=True)
                norms[side][layer].append(gradient.norm().item())
    model.requires_grad_(False)
    return {"seconds of a pass per layer, per prompt": (time.perf_counter() - start) / len(prompts), "norms": norms}


def allocations(found: Profile) -> dict[str, tuple[str, Allocation]]:
    """Per row its group, and bits per layer."""
    rows: dict[str, tuple[str, Allocation]] = {}
    layers = found.model.layers

    def bits(made: Allocation) -> int:
        return budget.nbytes(get("kivi", recent=32, allocation=made), found.model, SEQLEN)

    def add(group: str, name: str, made: Allocation) -> None:
        rows[f"{group}: {name}"] = group, made

    def compete(group: str, base: Allocation, first: str) -> None:
        """The widths of `base` on other layers, and what a solver makes of as many bytes."""
        add(group, first, base)
        for score in ("gradient-norm", "loss-change"):
            if (made := _ordered(found, base, score)) != Allocation(k=base.k, v=base.v):
                add(group, f"by {score}", made)
        for seed in range(5):
            add(group, f"random {seed}", rules.shuffled(base, seed))
        for solver in ("exact", "greedy"):
            add(group, f"solver, {solver}", budget.solved(found, METHOD, bits(base), SEQLEN, solver=solver))
        add(group, "solver, 1 bit allowed", budget.solved(found, METHOD, bits(base), SEQLEN, choices=CHOICES))

    for width in (2, 3, 4):
        add("uniform", f"{width} bits", Allocation.of((width,) * layers, width))
    add("uniform", "k3v2", Allocation.of((3,) * layers, 2))
    compete("top 20%", budget.ranked(found, "gradient-norm", method=METHOD), "the paper's rule")
    compete("plain rule", rules.plain(layers), "the plain rule")
    compete("top 50%", budget.ranked(found, "gradient-norm", 0.5, method=METHOD), "the paper's rule")
    two = bits(Allocation.of((2,) * layers, 2))
    add("uniform", "solver at 2 bits, 1 bit allowed", budget.solved(found, METHOD, two, SEQLEN, choices=CHOICES))
    return rows


def _ordered(found: Profile, base: Allocation, score: str) -> Allocation:
    """The widths of `base`, the widest where the score is highest."""
    sides = {}
    for side in SIDES:
        widths = sorted(getattr(base, side), reverse=True)
        if score == "gradient-norm":
            scores = found.norms(side)
        else:
            changes = budget.changes_of(found, METHOD)
            scores = changes.at(side, widths[-1]) - changes.at(side, widths[0])
        order = sorted(range(len(widths)), key=lambda layer: -scores[layer])
        sides[side] = tuple(widths[order.index(layer)] for layer in range(len(widths)))
    return Allocation(**sides)


def recipes(found: Profile) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """Rows that are stored; and one side of one layer coded alone, which is simulated."""
    stored = {"exact": parse("exact")}
    made = allocations(found)
    stored |= {name: get("kivi", recent=32, allocation=alloc) for name, (_, alloc) in made.items()}
    paper = made["top 20%: the paper's rule"][1]
    for of in ("waiting", "context"):
        stored[f"kvmix: the paper's rule, share of {of}"] = get("kvmix", allocation=paper, ratio_of=of)
    alone, layers = {"exact": parse("exact")}, found.model.layers
    for width in ALONE_BITS:
        for layer in range(layers):
            for side in SIDES:
                sides = {name: [16] * layers for name in SIDES}
                sides[side][layer] = width
                made_ = Allocation(**{name: tuple(x) for name, x in sides.items()})
                alone[f"{side}{width} of layer {layer}"] = get("kivi", recent=32, allocation=made_)
    return stored, alone


def measure(variant: str, data_dir: str) -> None:
    """All rows of one variant of the model, into lines of JSON."""
    model, tokenizer = load(dtype="float32")
    if variant != "plain":
        inject(model, variant, SEED)
    found = scored(model, tokenizer, variant, data_dir)
    stored, alone = recipes(found)
    results = Results(OUT / f"{variant}.jsonl")
    for source in WINDOWS:
        documents = text.texts(source, data_dir, "test")
        every = text.windows(tokenizer, documents, SEQLEN)
        step = len(every) // WINDOWS[source]  # rows know windows by number: another step is another text
        chosen = Text(every[::step][: WINDOWS[source]], source, f"{text.digest(documents)}/{step}")
        print(f"{variant}: {source}", flush=True)
        for recipes_, mode, count in ((stored, "stored", None), (alone, "simulated", ALONE)):
            contenders = [Contender(name, made) for name, made in recipes_.items()]
            task = Perplexity(Text(chosen.windows[:count], chosen.source, chosen.digest), mode)
            run(task, Subject.of(model, variant), contenders, results)
    (OUT / variant / "complete").touch()


def _cells(variant: str, named: dict[str, Recipe], mode: str, source: str) -> dict[str, Cell]:
    """By the names that recipes have now."""
    found = {}
    for cell in Results(OUT / f"{variant}.jsonl").cells():
        if (cell.first.settings["mode"], cell.first.settings["source"]) == (mode, source):
            found[cell.first.digest] = cell.rows
    return {name: Cell(found[digest_of(recipe)], name) for name, recipe in named.items()}


def table() -> None:
    """Per variant: the rows with paired intervals against the first of their group, and how well scores rank sides."""
    rows, ranking, cost = [], [], {}
    for variant in VARIANTS:
        if not (OUT / variant / "complete").exists():
            continue
        found = Profile.load(OUT / variant / "profile.json")
        cost[variant] = json.loads((OUT / variant / "cost.json").read_text())
        cost[variant].pop("norms")
        stored, alone = recipes(found)
        groups = allocations(found)
        for source in WINDOWS:
            measured = _cells(variant, stored, "stored", source)
            for group in dict.fromkeys(group for group, _ in groups.values()):
                own = [name for name, (of, _) in groups.items() if of == group]
                if group == "top 20%":
                    own += [name for name in stored if name.startswith("kvmix")]
                for line in summary([measured[name] for name in own], own[0], SEED):
                    made = groups[line["method"]][1] if line["method"] in groups else None
                    widths = {} if made is None else {"k": made.k, "v": made.v}
                    rows.append({"variant": variant, "text": source, "group": group} | line | widths)
            ranking += _ranking(variant, source, found, _cells(variant, alone, "simulated", source))
    head = {"prompts": PROMPTS, "tokens": LENGTH, "seqlen": SEQLEN, "windows per text": WINDOWS, "seed": SEED}
    head |= {"method": METHOD, "cost": cost, "ranking": ranking}
    with replacing(HERE / "kvmix.json") as scratch:
        scratch.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def _ranking(variant: str, source: str, found: Profile, measured: dict[str, Cell]) -> list[dict]:
    """Spearman's correlation, over layers, of each score with the KL measured when that side alone is coded."""
    lines, changes = [], budget.changes_of(found, METHOD)
    for width in ALONE_BITS:
        for side in SIDES:
            kls = [measured[f"{side}{width} of layer {i}"].values["kl"] for i in range(found.model.layers)]
            kl = torch.tensor([sum(some) / len(some) for some in kls]).numpy()
            line = {"variant": variant, "text": source, "side": side, "bits": width, "kl": kl.tolist()}
            line["gradient-norm"] = spearman(found.norms(side), kl)
            line["loss-change"] = spearman(changes.at(side, width), kl)
            line["foreseen"] = changes.at(side, width).tolist()
            lines.append(line)
    return lines


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
