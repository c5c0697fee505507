"""Every method measured the same way: runs/leaderboard, of two small models, plain and with strong planted outliers.

    python runs/leaderboard.py all --data-dir DIR       # both models side by side, a thread each; goes on if stopped
    python runs/leaderboard.py gates --data-dir DIR     # are the ports faithful?
    python runs/leaderboard.py pack                     # runs/leaderboard from out/runs-leaderboard

`--full` measures more, too: keys and values alone, nuisance factors, the harder questions, WikiText-2, more recipes.
KVQuant is calibrated and KVmix profiled for each variant of a model, on training novels; all is scored on novels held
out from training, in bf16.
"""

import argparse
import json
import lzma
import subprocess
import sys
from pathlib import Path

import torch

from kvist import text
from kvist.atomic import replacing, write_json
from kvist.bench.reports import Gates
from kvist.calibrate import budget
from kvist.calibrate.run import calibrate
from kvist.calibrate.sensitivity import profile
from kvist.demo.model import FOLDER
from kvist.evaluate.contenders import Contender, contender, floors, parted
from kvist.evaluate.results import Results
from kvist.evaluate.statistics import difference
from kvist.evaluate.task import Subject, Task, run
from kvist.evaluate.tasks.fidelity import Fidelity, Perplexity
from kvist.evaluate.tasks.horizon import Horizon
from kvist.evaluate.tasks.nuisance import Nuisance
from kvist.evaluate.tasks.recall import Haystack, Recall
from kvist.evaluate.windows import Text
from kvist.methods import get, parse
from kvist.methods.parts import per_token
from kvist.models.inject import inject, rounded
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from anatomy import anatomy, sentences
from gates import gates

HERE, OUT = Path(__file__).parent, Path("out/runs-leaderboard")
REFERENCES = HERE.parent / "references"
MODELS = {"kvist-6m": FOLDER, "reference-bias-1to1-64": REFERENCES / "bias-1to1-64"}
MORE = {"reference-norm-4to1-128": REFERENCES / "norm-4to1-128"}
STRESSES = ("plain", "strong")
SEED, BATCH, STEP = 0, 8, 32
WINDOWS, SEQLEN, PROMPT = 64, 2048, 1792
HORIZON, DRIFTING = 1500, 8
METHOD, PROFILED, SAMPLES = "kivi recent=32", 12, 8
SIMPLE = (
    *("kivi:2", "kivi:3", "kivi:4", "logquant:2", "logquant:4", "partial-logquant:2", "streaming:2", "streaming:4"),
    *("kvmix:2", "kvmix:4", "hadamard:2", "hadamard:3", "hadamard:4"),
)
CONTROLS = ("quanto:2", "quanto:4")
EXTRA = ("kivi k=4 v=2", "kivi:2 sinks=4", "kvmix:3", "partial-streaming:2", "hadamard:2 group=32", "hqq:2", "hqq:4")


def contenders(model, tokenizer, folder: Path, data_dir: str, full: bool) -> list[Contender]:
    """The exact cache first; then what is compared with it."""
    identity_bits = parse("logquant:2").bits_per_element(_shape(model), 1, SEQLEN)
    found = [contender(name) for name in ("exact", *SIMPLE)]
    found += [Contender(f"int{bits} (control)", recipe=_integers(bits)) for bits in (2, 3, 4)]
    found.append(Contender("sinks + recent (control)", recipe=_recent(model, identity_bits)))
    found += _fitted(model, tokenizer, folder, data_dir)
    found += [contender(name) for name in CONTROLS]
    return found + [contender(name) for name in EXTRA if full]


def _shape(model):
    from kvist.models.adapter import describe

    return describe(model).shape


def _integers(bits: int) -> Recipe:
    """Per-token integers: what one would try first."""
    side = Side(codec=per_token(bits), retention=Immediate())
    return Recipe(name=f"int{bits}", layers=(LayerPlan(key=side, value=side),))


def _recent(model, bits: float) -> Recipe:
    """Four sinks and a recent window, as long as LogQuant's exact tokens cost."""
    shape = _shape(model)

    def made(window: int) -> Recipe:
        return parse(f"kivi:2 values=block sinks=4 recent={window}")

    return min(map(made, range(32, 512, 32)), key=lambda each: abs(each.bits_per_element(shape, 1, SEQLEN) - bits))


def _fitted(model, tokenizer, folder: Path, data_dir: str) -> list[Contender]:
    """KVQuant at three widths, KVmix by its paper's rule, and a solver's allocation of the bytes of `kivi:3`."""
    from kvist.artifact import Settings

    documents = text.texts("novels", data_dir, "train")
    windows, digest = text.sample(tokenizer, documents, SAMPLES, SEQLEN, SEED), text.digest(documents)
    found = []
    for bits in (2, 3, 4):
        artifact = folder / f"kvquant-{bits}"
        if not (artifact / "artifact.json").exists():
            artifact.mkdir(parents=True, exist_ok=True)
            settings = Settings(bits=bits)
            calibrate(model, windows, settings, source="novels", digest=digest, seed=SEED, folder=artifact)
        found.append(Contender(f"kvquant:{bits}", recipe=get("kvquant", artifact=str(artifact))))
    path = folder / "profile.json"
    if not path.exists():
        prompts, digest = text.draw(tokenizer, "novels", data_dir, PROFILED, 1024, SEED)
        profile(model, prompts, {METHOD: (2, 3, 4, 8)}, source="novels", digest=digest, seed=SEED, out=path)
    from kvist.calibrate.profile import Profile

    scores = Profile.load(path)
    paper = budget.ranked(scores, "gradient-norm", method=METHOD)
    found.append(Contender("kvmix, paper's rule", recipe=get("kvmix", allocation=paper)))
    bytes_ = budget.nbytes(parse("kivi:3 recent=32"), scores.model, SEQLEN)
    solved = budget.solved(scores, METHOD, bytes_, SEQLEN)
    found.append(Contender("kivi, solved", recipe=get("kivi", recent=32, allocation=solved)))
    return found


def tasks(tokenizer, data_dir: str, full: bool) -> list[Task]:
    """What all contenders go through."""
    documents = text.texts("novels", data_dir, "test")
    digest = text.digest(documents)

    def windows(seqlen: int, count: int) -> Text:
        every = text.windows(tokenizer, documents, seqlen)
        return Text(every[:: len(every) // count][:count], "novels", f"{digest}/{count}")

    hay = Haystack(tuple(documents), "novels")

    def asked(kind: str, samples: int, depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> Recall:
        return Recall(kind, tokenizer, hay, (960, 1880), depths, samples, SEED, batch=BATCH)

    found: list[Task] = [
        Fidelity(windows(SEQLEN, WINDOWS), "stored", PROMPT, STEP, batch=BATCH),
        Horizon(windows(HORIZON, DRIFTING), 0, STEP, (512, 1024), STEP, 128, batch=BATCH),
        asked("needle", 10),
        asked("multi-key", 25),
        asked("variable-tracking", 25),
    ]
    if full:
        wikitext = text.texts("wikitext2", data_dir, "test")
        other = Text(text.windows(tokenizer, wikitext, SEQLEN, 32), "wikitext2", text.digest(wikitext))
        found += [
            Perplexity(other, batch=BATCH),
            Perplexity(other, "simulated", batch=BATCH),
            Nuisance(windows(1024, 8), 512, STEP),
            *(asked(kind, 25) for kind in ("multi-value", "multi-query", "aggregation")),
            Recall("passkey", tokenizer, Haystack.noise(), (960, 1880), samples=10, batch=BATCH),
        ]
    return found


def measure(name: str, stress: str, data_dir: str, full: bool) -> None:
    """One variant of one model, into lines of JSON."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = (MODELS | MORE)[name]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if stress != "plain":
        inject(model, stress, SEED)
    folder = OUT / f"{name}-{stress}"
    folder.mkdir(parents=True, exist_ok=True)
    documents = text.texts("novels", data_dir, "test")
    seen = anatomy(model, text.windows(tokenizer, documents, 1024, 4))
    write_json(folder / "anatomy.json", seen)
    print("\n".join([f"{name} {stress}", *(f"  {sentence}" for sentence in sentences(seen))]), flush=True)
    every = contenders(model, tokenizer, folder, data_dir, full)
    subject = Subject.of(rounded(model, torch.bfloat16), "none" if stress == "plain" else stress)
    results = Results(OUT / f"{name}-{stress}.jsonl")
    for task in tasks(tokenizer, data_dir, full):
        some = [each for each in every if each.recipe or not task.recipes_only]
        if task.name == "fidelity":
            some = floors(model.dtype) + (parted(some, ("both", "keys", "values")) if full else some)

        def tick(what: str, done: int, total: int) -> None:
            print(f"{name} {stress} {what}: {done} of {total}", end="\n" if done == total else "\r", flush=True)

        run(task, subject, some, results, tick=tick)


def check(data_dir: str) -> None:
    """Are the ports faithful? On the bundled model; prints what it finds, and keeps it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    windows = text.windows(tokenizer, text.texts("novels", data_dir, "test"), SEQLEN, 4)
    found = gates(model, windows) + [_ablation(stress) for stress in ("plain", "mild", "strong")]
    write_json(OUT / "gates.json", found)
    for gate in found:
        print(f"{'holds' if gate['holds'] else 'FAILS'}: {gate['gate']}: {gate['found']}")


def _ablation(stress: str) -> dict:
    """Is each part of KVQuant worth what the paper's order says? From runs/kvquant.json: the divergence with the part
    left out over that with all parts, 3 bits and 1 %."""
    rows = json.loads((HERE / "kvquant.json").read_text())["rows"]
    kls = {
        row["method"]: row["kl"]["value"]
        for row in rows
        if (row["variant"], row["text"], row["mode"]) == (stress, "novels", "simulated")
    }
    whole, turned = kls["nuq3-1%"], kls["nuq3-1%, post-RoPE"]
    worth = {
        "keys per channel": kls["nuq3-1%, keys per token, post-RoPE"] / turned,
        "keys before RoPE": turned / whole,
        "non-uniform levels": kls["int3-1%"] / whole,
        "1 % outliers": kls["nuq3"] / whole,
    }
    return {
        "gate": f"kvquant, {stress}: parts are worth what the paper's order says ({' > '.join(worth)})",
        "holds": list(worth.values()) == sorted(worth.values(), reverse=True),
        "found": "KL without over KL with: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in worth.items()),
    }


def _beside(path: Path) -> dict | None:
    """LogQuant and a plain recent window of as many bytes, on the same windows."""
    cells = {cell.method: cell for cell in Results(path).cells() if cell.first.task == "fidelity"}
    if not {"logquant:2", "sinks + recent (control)"} <= cells.keys():
        return None
    log, recent = cells["logquant:2"], cells["sinks + recent (control)"]
    change = difference(log.values["kl"], recent.values["kl"], SEED)
    return {
        "gate": f"{path.stem}: logquant:2 diverges less than 4 sinks and a recent window of as many bytes",
        "holds": change.high is not None and change.high < 0,
        "found": f"{log.bits:.2f} and {recent.bits:.2f} bits; KL {sum(log.values['kl']) / len(log.items):.4f} and "
        f"{sum(recent.values['kl']) / len(recent.items):.4f}, paired difference {change}",
    }


def pack() -> None:
    """What was measured, compressed, into the repository; `kvist report runs/leaderboard` draws it."""
    target = HERE / "leaderboard"
    target.mkdir(exist_ok=True)
    found = json.loads((OUT / "gates.json").read_text()) if (OUT / "gates.json").exists() else []
    for path in sorted(OUT.glob("*.jsonl")):
        with replacing(target / f"{path.name}.xz") as scratch:
            scratch.write_bytes(lzma.compress(path.read_bytes(), preset=9))
        found += filter(None, [_beside(path)])
    write_json(target / "gates.json", Gates(title="Are the ports faithful?", rows=found).data)
    anatomies = {path.parent.name: json.loads(path.read_text())["summary"] for path in OUT.glob("*/anatomy.json")}
    write_json(HERE / "anatomy.json", dict(sorted(anatomies.items())))


def unpack() -> None:
    """What an earlier run packed is where this one goes on."""
    for path in (HERE / "leaderboard").glob("*.jsonl.xz"):
        target = OUT / path.name.removesuffix(".xz")
        if not target.exists():
            with replacing(target) as scratch:
                scratch.write_bytes(lzma.decompress(path.read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["all", "gates", "pack", *MODELS, *MORE])
    parser.add_argument("--stress", choices=STRESSES, help="one variant alone")
    parser.add_argument("--data-dir", help="a folder of data: train/novels.txt.xz, eval/novels.txt, eval/wikitext2")
    parser.add_argument("--threads", type=int, default=1, help="of torch; models run side by side")
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    if given.what == "pack":
        return pack()
    if not given.data_dir:
        parser.error("--data-dir is needed: a folder of data to calibrate and to score on")
    torch.set_num_threads(given.threads)
    OUT.mkdir(parents=True, exist_ok=True)
    unpack()
    if given.what == "gates":
        return check(given.data_dir)
    if given.what == "all":
        rest = [word for word in sys.argv[1:] if word != "all"]
        running = [subprocess.Popen([sys.executable, __file__, name, *rest]) for name in MODELS]
        sys.exit(max(process.wait() for process in running))
    for stress in [given.stress] if given.stress else STRESSES:
        measure(given.what, stress, given.data_dir, given.full)
    return None


if __name__ == "__main__":
    main()
