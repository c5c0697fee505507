"""Quantizer files as KVQuant publishes them become artefacts, number by number; wrong ones a sentence."""

import json
import os

import numpy as np
import pytest
import torch
import typer
from families.zoo import DBRX
from hostile import touch
from models_tiny import llama_config, tiny_llama
from quantizers import BLOCKS, CHANNELS, LAYERS, LLAMA, Reduced, broken, codebook, dump, entries, file, lone, old_numpy
from transformers import DbrxConfig, DbrxForCausalLM
from typer.testing import CliRunner

from kvist.artifact import Artifact
from kvist.calibrate import published
from kvist.calibrate.pickled import read
from kvist.calibrate.published import load, to_artifact
from kvist.calibrate.tables import evenly, normal_float
from kvist.cli.errors import Verbs
from kvist.cli.import_kvquant import import_kvquant
from kvist.models.rope import rotary


def imported(tmp_path, found, model=None, **options) -> Artifact:
    return to_artifact(load(file(tmp_path, found)), model or tiny_llama(), **options)


def refusal(tmp_path, found, **options) -> str:
    with pytest.raises(ValueError) as error:
        imported(tmp_path, found, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


@pytest.fixture(scope="module")
def dbrx():
    with torch.device("meta"):
        return DbrxForCausalLM(DbrxConfig(**DBRX))


def single(x) -> tuple[float, ...]:
    return tuple(np.asarray(x, np.float64).astype(np.float32).tolist())


def half(x) -> np.ndarray:
    return np.asarray(x, np.float64).astype(np.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("form", [LLAMA, BLOCKS])
@pytest.mark.parametrize("spelling", [lambda data: data, old_numpy], ids=["numpy2", "numpy1"])
def test_thresholds_and_codebooks(tmp_path, dtype, form, spelling):
    """Thresholds to fp16 first, zero point and half range from those in fp16; codebooks sorted, and as they are."""
    found = entries(dtype=dtype, form=form)
    artifact = imported(tmp_path, spelling(dump(found)))
    for i in range(LAYERS):
        upper, lower, (points,) = found[form.format(i, "k")]
        high, low = half(upper[0]), half(lower[0])
        fit = artifact.keys[i]
        assert fit.range.high == tuple(high.tolist()) and fit.range.low == tuple(low.tolist())
        assert fit.table.points == single(np.sort(points.ravel())) and fit.table.read is None
        scale, offset = (x.flatten().numpy() for x in fit.range.affine(fit.table, 2, torch.device("cpu")))
        assert (offset == (high + low) / np.float16(2)).all() and (scale == (high - low) / np.float16(2)).all()
        value = artifact.values[i]
        points = found[form.format(i, "v")][2][0]
        assert value.range is None and value.table.points == single(np.sort(points.ravel()))
    assert (artifact.settings.levels, artifact.settings.bits, artifact.settings.qnorm) == ("nuq", 3, False)
    assert artifact.settings.keys == "pre-rope" and artifact.rotary == rotary(tiny_llama())
    assert not artifact.on_grid


def test_the_order_of_rounding_shows():
    """1 + 2^-11 is 1 in fp16, so with 2^-11 the offset is 1/2 and the scale 1/2 - 2^-12; of the numbers as they were,
    1/2 + 2^-11 and 1/2."""
    high, low = torch.tensor([[1 + 2**-11]]), torch.tensor([[2**-11]])
    quantizer = published._quantizer((high, low, codebook(2)), "key")
    fixed = published._range(quantizer, 1, 0)
    scale, offset = fixed.affine(published._table(quantizer, "nuq", 2), 1, torch.device("cpu"))
    assert (offset.item(), scale.item()) == (0.5, 0.5 - 2**-12)
    unrounded = half([(high + low).item() / 2, (high - low).item() / 2]).tolist()
    assert unrounded == [0.5 + 2**-11, 0.5]


def test_codes_are_those_of_the_files_own_centroids(tmp_path):
    """The nearest centroid by the file's fp32 numbers, and read back as that number: fp16 would move some of both."""
    found = entries(bits=4)
    table = imported(tmp_path, found).values[0].table
    (points,) = found[LLAMA.format(0, "v")][2]
    points = torch.tensor(np.sort(points.ravel()))
    u = torch.linspace(-1.2, 1.2, 20001)
    nearest = (u[:, None].double() - points.double()).abs().argmin(1)
    assert ((table.index(u) != nearest).sum() <= 1) and torch.equal(table.point(nearest), points[nearest])
    moved = points.half().float()
    assert not torch.equal(moved, points)


def test_qnorm_moves_what_is_read(tmp_path):
    """points·scale + offset in fp64, from the file's own centroids, then rounded once; decisions stay."""
    for dtype in (torch.float32, torch.float64):
        found = entries(items=5, bits=2, dtype=dtype)
        artifact = imported(tmp_path, found)
        assert artifact.settings.qnorm
        for i in range(LAYERS):
            for side, fit in (("k", artifact.keys[i]), ("v", artifact.values[i])):
                _, _, (points,), scale, offset = found[LLAMA.format(i, side)]
                points = np.sort(points.ravel().astype(np.float64))
                assert fit.table.points == single(points)
                assert fit.table.read == single(points * scale.item() + offset.item())
                assert fit.table.read != fit.table.points


@pytest.mark.parametrize("items", [3, 5])
@pytest.mark.parametrize("extra", [(0,), (torch.zeros(1),), ([], "dummy", None)])
def test_trailing_items(tmp_path, items, extra):
    if items == 3 and len(extra) > 1:
        extra = extra[:1]  # with two more it would be Q-Norm's place
    plain, more = (imported(tmp_path, entries(items=items, extra=e)) for e in ((), extra))
    assert (plain.keys, plain.values, plain.settings) == (more.keys, more.values, more.settings)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("points", [np.float32, np.float64])
def test_bits_are_inferred(tmp_path, bits, points):
    assert imported(tmp_path, entries(bits=bits, points=points)).settings.bits == bits


@pytest.mark.parametrize(("levels", "ladder"), [("nf", normal_float), ("int", evenly)])
@pytest.mark.parametrize("extra", [(), (0,)])
def test_without_codebooks(tmp_path, levels, ladder, extra):
    found = entries(items=2, extra=extra)
    assert "--levels nf or int, and --bits" in refusal(tmp_path, found)
    for options in ({"levels": levels}, {"bits": 3}, {"levels": levels, "bits": 8}, {"levels": "nuq", "bits": 3}):
        assert "--levels nf or int, and --bits" in refusal(tmp_path, found, **options)
    artifact = imported(tmp_path, found, levels=levels, bits=4)
    assert (artifact.settings.levels, artifact.settings.bits) == (levels, 4)
    exact = artifact.keys[0].table
    assert exact.points == single(ladder(4))


def test_defaults_of_families(tmp_path, dbrx):
    artifact = imported(tmp_path, entries())
    assert (artifact.settings.cap, artifact.settings.sinks, artifact.settings.slots) == ("token", 5, 0)
    artifact = imported(tmp_path, entries(form=BLOCKS, channels=32), dbrx)
    assert (artifact.settings.cap, artifact.settings.sinks) == ("none", 1)
    assert artifact.settings.slots == 4  # 1 % of 32 channels is one on each side; twice that
    assert imported(tmp_path, entries(form=BLOCKS, channels=32), dbrx, slots=6).settings.slots == 6
    chosen = imported(tmp_path, entries(), cap="none", sinks=2, outliers=0.05).settings
    assert (chosen.cap, chosen.sinks, chosen.slots, chosen.outliers) == ("none", 2, 8, 0.05)
    dense = imported(tmp_path, entries(), cap="none", outliers=0.0).settings
    assert (dense.slots, dense.outliers) == (0, 0.0)


def test_refused_options(tmp_path):
    found = entries()
    assert "'token' or 'none'" in refusal(tmp_path, found, cap="off")
    assert "--cap none" in refusal(tmp_path, found, slots=4)
    for slots in (3, -2, 66):
        assert "even number from 0 to 64" in refusal(tmp_path, found, cap="none", slots=slots)
    assert "codebooks of 3 bits" in refusal(tmp_path, found, bits=4)
    assert "codebooks of 3 bits" in refusal(tmp_path, found, levels="nf")
    assert "at least 0" in refusal(tmp_path, found, sinks=-1)


def test_artifact_round_trip(tmp_path):
    artifact = imported(tmp_path, entries(items=5, bits=2))
    artifact.save(tmp_path / "out")
    assert Artifact.load(tmp_path / "out") == artifact
    assert artifact.origin.source == "quantizer.pickle" and len(artifact.origin.digest) == 32


def test_the_published_size():
    """32 layers of 4096 channels, keys' thresholds fp32, values' fp64 over 32768 tokens: 17,870,393 bytes; the files on
    the hub have 17,869,112 (7e-5 less). They are read without a copy of what is not needed."""
    upper, lower = torch.ones(1, 4096), torch.zeros(1, 4096)
    values = torch.zeros(32768, 1, dtype=torch.float64)
    found = {}
    for i in range(32):
        found[LLAMA.format(i, "k")] = (upper, lower, codebook(3))
        found[LLAMA.format(i, "v")] = (values, values, codebook(3))
    data = dump({k: tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in v) for k, v in found.items()})
    assert len(data) == pytest.approx(17_869_112, rel=1e-4)
    again = read(data)
    assert all(torch.equal(again[LLAMA.format(31, s)][0], found[LLAMA.format(31, s)][0]) for s in "kv")


def without(name):
    return {key: entry for key, entry in entries().items() if key != name}


def mixed():
    return entries(bits=3) | {LLAMA.format(1, "v"): entries(bits=4)[LLAMA.format(1, "v")]}


WRONG = {
    "nan": (lambda: broken(_0=lone(float("nan"))), "keys of layer 1: its thresholds are not finite"),
    "infinite": (lambda: broken(_0=lone(float("inf"))), "not finite"),
    "beyond fp16": (lambda: broken(_0=lone(7e4)), "not finite numbers of fp16"),
    "crossed": (lambda: broken(_0=lone(-1e3)), "lower thresholds exceed"),
    "unlike": (lambda: broken(_0=torch.ones(1, 3)), "one shape"),
    "matrix": (lambda: broken(_0=torch.ones(2, 32), _1=torch.zeros(2, 32)), "one shape (1, channels)"),
    "no tensor": (lambda: broken(_0=1.0), "no tensors"),
    "centroids nan": (lambda: broken(_2=[np.full((8, 1), np.nan, np.float32)]), "not of finite"),
    "centroids huge": (lambda: broken(_2=[np.full((8, 1), 1e30)]), "not of finite"),
    "seven centroids": (lambda: broken(_2=[np.ones((7, 1), np.float32)]), "4, 8, 16 or 32"),
    "flat centroids": (lambda: broken(_2=[np.ones((2, 4), np.float32)]), "4, 8, 16 or 32"),
    "two codebooks": (lambda: broken(_2=codebook() * 2), "no array"),
    "half centroids": (lambda: broken(_2=[np.ones((8, 1), np.float16)]), "fp32 or fp64"),
    "negative Q-Norm": (lambda: broken(_3=torch.tensor(-1.0)), "above 0"),
    "Q-Norm nan": (lambda: broken(_3=torch.tensor(float("nan"))), "Q-Norm"),
    "Q-Norm huge": (lambda: broken(_3=torch.tensor(6e4), _4=torch.tensor(6e4)), "leaves the range"),
    "Q-Norm vector": (lambda: broken(_4=torch.ones(2)), "Q-Norm"),
    "Q-Norm half": (lambda: broken(_4=torch.ones((), dtype=torch.float16)), "Q-Norm"),
    "Q-Norm text": (lambda: broken(_4="0"), "Q-Norm"),
    "missing keys": (lambda: without(LLAMA.format(1, "k")), "lacks the keys of layer 1"),
    "missing values": (lambda: without(LLAMA.format(0, "v")), "lacks the values of layer 0"),
    "more layers": (lambda: entries(layers=3), "layer 2; llama has 2 layers"),
    "channels": (lambda: entries(channels=32), "layer 0: expected thresholds of 64 key channels, found 32"),
    "mixed bits": (mixed, "codebooks of one size"),
    "empty": (dict, "no dict"),
    "list": (lambda: [1, 2], "no dict"),
    "short": (lambda: {LLAMA.format(0, "k"): (torch.ones(1, CHANNELS),)}, "at least two"),
    "other key": (lambda: entries() | {"model.layers.0.self_attn.q_proj": (1, 2)}, "q_proj"),
    "no number": (lambda: entries() | {"model.self_attn.k_proj": (1, 2)}, "expected keys such as"),
    "two numbers": (lambda: entries() | {"model.0.layers.1.k_proj": (1, 2)}, "expected keys such as"),
    "twice": (lambda: entries() | entries(form=BLOCKS), "twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents(tmp_path, case):
    make, words = WRONG[case]
    assert words in refusal(tmp_path, make())


def test_luts_are_skipped(tmp_path):
    found = entries() | {"model.layers.0.self_attn.k_proj.lut": "whatever"}
    assert imported(tmp_path, found).keys == imported(tmp_path, entries()).keys


def test_degenerate_ranges_and_points_are_kept(tmp_path):
    """A channel that never moved, and centroids that fell together."""
    found = broken(_0=lone(0.5), _1=lone(0.5), _2=[np.full((8, 1), 0.25, np.float32)])
    artifact = imported(tmp_path, found)
    assert artifact.keys[1].range.low == artifact.keys[1].range.high and set(artifact.keys[1].table.points) == {0.25}


@pytest.fixture
def call(tmp_path):
    """The verb, in a program of its own."""
    app = typer.Typer(cls=Verbs, add_completion=False)
    app.callback()(lambda: None)
    app.command("import-kvquant")(import_kvquant)
    config = tmp_path / "model"
    llama_config(architectures=["LlamaForCausalLM"]).save_pretrained(config)

    def run(path, *words, code=0):
        options = ["--model", str(config), "--out", str(tmp_path / "out"), *words]
        result = CliRunner().invoke(app, ["import-kvquant", str(path), *options])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return run


def test_command(tmp_path, call):
    path = file(tmp_path, entries(items=5, bits=2))
    said = call(path).stdout
    assert "nuq2 for 2 layers of 64 KV channels, with Q-Norm" in said and "Cap token, 2 outliers per token" in said
    assert "5 sinks (as published" in said and "kept in fp32; the same code reads both" in said
    artifact = Artifact.load(tmp_path / "out")
    assert artifact.settings.bits == 2 and artifact.settings.sinks == 5
    assert artifact.keys == imported(tmp_path, entries(items=5, bits=2)).keys
    figures = json.loads(call(path, "--sinks", "2", "--cap", "none", "--slots", "6", "--json").stdout)
    assert (figures["sinks"], figures["cap"], figures["slots"], figures["on_grid"]) == (2, "none", 6, False)
    assert Artifact.load(tmp_path / "out").settings.slots == 6
    said = call(path, "--cap", "none").stdout
    assert "4 outliers per token" in said and "twice the share" in said and "as published" not in said
    said = call(file(tmp_path, entries(items=2)), "--levels", "int", "--bits", "4", "--outliers", "0").stdout
    assert "int4" in said and "no outliers" in said and "256" not in said


@pytest.mark.parametrize("words", [(), ("--bits", "4"), ("--cap", "some"), ("--outliers", "70%"), ("--model", "/none")])
def test_command_refuses(tmp_path, call, words):
    """One sentence, exit code 2, nothing written."""
    found = {"a": Reduced(os.system, touch(tmp_path / "sentinel"))} if not words else entries()
    result = call(file(tmp_path, found), *words, code=2)
    assert result.stdout == "" and result.stderr.startswith("kvist: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "sentinel").exists()
