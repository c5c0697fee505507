"""The doors through which strangers' files come in: a genuine file for each, how it is changed, and how it is used.

A door that lets a file in uses it as kvist would: recipes and artefacts code tokens, a cache answers the next token.
"""

import hashlib
import json
import lzma
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "calibrate"), str(TESTS / "report"), str(TESTS / "doors"), str(TESTS / "families")]

import mutate  # noqa: E402
import quantizers  # noqa: E402
import rows  # noqa: E402
import shrink  # noqa: E402
from artifacts import made  # noqa: E402
from models_tiny import tiny_llama, tokens  # noqa: E402

import kvist  # noqa: E402
from kvist import methods  # noqa: E402
from kvist.allocation import Allocation, rules  # noqa: E402
from kvist.artifact import JSON, TENSORS, Artifact, Origin  # noqa: E402
from kvist.bench import reports  # noqa: E402
from kvist.calibrate import published  # noqa: E402
from kvist.calibrate.profile import Changes, Norms, Profile  # noqa: E402
from kvist.evaluate.registry import kind_of  # noqa: E402
from kvist.methods import kvquant  # noqa: E402
from kvist.models import gguf_header  # noqa: E402
from kvist.models.adapter import describe  # noqa: E402
from kvist.models.compat import cache_argument  # noqa: E402
from kvist.plan import Recipe  # noqa: E402
from kvist.report.load import load as load_results  # noqa: E402

Draw = random.Random


@dataclass(frozen=True)
class Door:
    """make: write a genuine file (or folder) at a path; change: write a changed one at the second path, of the first;
    use: open it, raising what the door raises."""

    make: Callable[[Path], None]
    change: Callable[[Path, Path, Draw], None]
    use: Callable[[Path], None]


def code(recipe: Recipe) -> None:
    """Tokens through a cache of a recipe: a prompt, and steps that read what was packed."""
    model = tiny_llama()
    assert str(recipe) and recipe.bill(describe(model).shape, 2, 200).total() >= 0
    go_on(kvist.Cache(model, recipe), 140)


def go_on(cache, length: int = 1, model=None) -> None:
    """More tokens into a cache, then one that reads them packed; and its report."""
    model, batch = model or tiny_llama(), max(1, cache.inner.rows.batch)
    with torch.no_grad(), kvist.attach(model):
        for count in (length, 1):
            mask = torch.zeros(batch, cache.inner.rows.slots + count, dtype=torch.long)
            mask[:, cache.inner.rows.slots :] = 1
            for row in range(cache.inner.rows.batch):
                mask[row, cache.inner.rows.slot_of(row, mask.device)] = 1
            ids = tokens(batch, count)
            positions = (mask.cumsum(1) - 1)[:, -count:].clamp_min(0)
            model(ids, attention_mask=mask, position_ids=positions, **cache_argument(cache))
    str(cache.report())
    cache.close()


def built(family: str | None):
    """A tiny model: a family that has layers of transformers' own cache beside ours, or a Llama."""
    return shrink.tiny(family) if family else tiny_llama()


def saved(method: str, batch=1, length=183, crop=0, family: str | None = None) -> Callable[[Path], None]:
    """A cache of a batch, its first row padded on the left, cropped and grown again where told."""

    def make(path: Path) -> None:
        folder = path.parent / "fitted"
        if not folder.exists():
            made(outliers=0.1).save(folder)
        model = built(family)
        cache = kvist.Cache(model, method.format(folder))
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : 20 * (batch - 1)] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            model(tokens(batch, length), attention_mask=mask, position_ids=positions, **cache_argument(cache))
        if crop:
            cache.crop(-crop)
            go_on(cache, 70)
        cache.save(path)

    return make


def change_cache(source: Path, target: Path, draw: Draw) -> None:
    """Its header, its arrays, both with a checksum that fits, or its bytes."""
    if draw.random() < 0.15:
        target.write_bytes(mutate.octets(source.read_bytes(), draw))
        return
    with safe_open(source, framework="pt") as file:
        header, arrays = json.loads(file.metadata()["kvist"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    how = draw.random()
    if how < 0.75:
        part = draw.choice(("layers", "layers", "layers", "all"))
        header = mutate.tree(header, draw) if part == "all" else header | {part: mutate.tree(header[part], draw)}
    if how > 0.6:
        arrays = mutate.tensors(arrays, draw)
    text = json.dumps(header)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(arrays[name].flatten().view(torch.uint8).numpy().data)
    try:
        target.write_bytes(save(arrays, {"kvist": text, "digest": digest.hexdigest()}))
    except Exception:  # names that no file can have
        target.write_bytes(mutate.octets(source.read_bytes(), draw))


def change_artifact(source: Path, target: Path, draw: Draw) -> None:
    target.mkdir(exist_ok=True)
    head, data = json.loads((source / JSON).read_text()), (source / TENSORS).read_bytes()
    if draw.random() < 0.4:
        from safetensors.torch import load

        data = save(mutate.tensors(load(data), draw)) if draw.random() < 0.8 else mutate.octets(data, draw)
        head["digest"] = hashlib.blake2b(data, digest_size=16).hexdigest()
        text = json.dumps(head).encode()
    else:
        text = mutate.text(head, draw)
    (target / JSON).write_bytes(text)
    (target / TENSORS).write_bytes(data)


def change_json(source: Path, target: Path, draw: Draw) -> None:
    target.write_bytes(mutate.text(json.loads(source.read_text()), draw))


def change_octets(source: Path, target: Path, draw: Draw) -> None:
    target.write_bytes(mutate.octets(source.read_bytes(), draw))


def change_results(source: Path, target: Path, draw: Draw) -> None:
    data = source.read_bytes()
    if target.suffix == ".xz":
        target.write_bytes(mutate.packed(lzma.decompress(data), draw, mutate.lines))
    else:
        target.write_bytes(mutate.lines(data, draw))


def profile(path: Path) -> None:
    scores = tuple(tuple(0.1 * (layer + prompt + 1) for prompt in range(4)) for layer in range(2))
    changes = tuple(tuple(tuple(x / bits for x in prompts) for bits in (2, 4)) for prompts in scores)
    identity, origin = describe(tiny_llama()).identity, Origin(source="a book", digest="ab", samples=4)
    change = Changes(method="kivi", choices=(2, 4), k=changes, v=changes)
    Profile(
        model=identity, dtype="float32", origin=origin, gradient_norm=Norms(k=scores, v=scores), loss_change=(change,)
    ).save(path)


def use_profile(path: Path) -> None:
    found = Profile.load(path)
    rules.top(found.norms("k").tolist(), found.norms("v").tolist())
    assert found.unstable is not None and found.summary()


def use_results(path: Path) -> None:
    for group in load_results(path):
        assert group.about is not None and group.whole
        for entry in group.entries:
            assert entry.source
            kind_of(entry.cell).tell(entry.cell)


def write_results(path: Path) -> None:
    rows.write(path, rows.rows(methods=("exact", "kivi:2"), models=("kvist-6m",), stresses=("none",), items=3))


def write_report(path: Path) -> None:
    times = {"median ms": 1.5, "p10 ms": 1.0, "p90 ms": 2.0, "cache MiB": 3.0}
    named = [{"tokens": n, "contender": name, **times} for n in (64, 128) for name in ("dynamic", "kvist kivi:2")]
    reports.Decode(title="One step", machine={"threads": 2}, rows=named).save(path)


def use_report(path: Path) -> None:
    found = reports.load(path)
    assert found is None or (found.look and all(found.look.size.format(size) for size in found.drawn))


def write_packed(path: Path) -> None:
    write_results(path)
    path.write_bytes(lzma.compress(path.read_bytes(), preset=0))


def write_gguf(path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_tensor("token_embd.weight", torch.arange(96.0).view(3, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cache_door(method: str, **how) -> Door:
    def use(path: Path) -> None:
        model = built(how.get("family"))
        go_on(kvist.Cache.load(path, model), model=model)

    return Door(saved(method, **how), change_cache, use)


def recipe_door(method: str) -> Door:
    return Door(lambda path: methods.get(method).save(path), change_json, lambda path: code(Recipe.load(path)))


def fitted(path: Path) -> None:
    kvquant.recipe(made(outliers=0.1)).save(path)


DOORS = {
    "recipe.json": recipe_door("kivi"),
    "sparse.json": recipe_door("logquant"),
    "fitted.json": Door(fitted, change_json, lambda path: code(Recipe.load(path))),
    "artifact": Door(
        lambda path: made(outliers=0.1).save(path),
        change_artifact,
        lambda path: code(kvquant.recipe(Artifact.load(path))),
    ),
    "allocation.json": Door(
        lambda path: Allocation.of((3, 2), (4, 2)).save(path),
        change_json,
        lambda path: code(methods.get("kivi", allocation=path)),
    ),
    "profile.json": Door(profile, change_json, use_profile),
    "kivi.cache": cache_door("kivi recent=32"),
    "cropped.cache": cache_door("kivi recent=32", batch=2, length=200, crop=45),
    "sparse.cache": cache_door("logquant window=32", batch=2),
    "fitted.cache": cache_door("kvquant artifact={}", batch=2),
    "exact.cache": cache_door("exact", length=40),
    "window.cache": cache_door("int4", batch=2, length=40, family="gemma3_text"),
    "conv.cache": cache_door("int4", length=40, family="lfm2"),
    "state.cache": cache_door("int4", length=40, family="jamba"),
    "results.jsonl": Door(
        write_results,
        change_results,
        use_results,
    ),
    "results.jsonl.xz": Door(
        write_packed,
        change_results,
        use_results,
    ),
    "decode.json": Door(write_report, change_json, use_report),
    "quantizer.pickle": Door(
        lambda path: path.write_bytes(quantizers.unframed(quantizers.dump(quantizers.entries(items=5)))) and None,
        change_octets,
        lambda path: code(kvquant.recipe(published.to_artifact(published.load(path), tiny_llama()))),
    ),
    "model.gguf": Door(write_gguf, change_octets, lambda path: gguf_header.read_header(path) and None),
}
