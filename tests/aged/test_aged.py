"""Files of the last release: each is read, or refused by name.

The folder 0.1.0 holds one file of each kind, made by that release from the model that it bundled and from a tiny one:
`calibrate`, `profile`, `allocate` and `eval`, `Recipe.save` and `Cache.save`. Made anew at a release, by that release.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from models_tiny import tiny_llama

import kvist
from kvist.artifact import Artifact
from kvist.calibrate.profile import Profile
from kvist.evaluate.results import Results
from kvist.methods import get, parse
from kvist.report.load import load

LAST = Path(__file__).with_name("0.1.0")
KINDS = {"allocation.json", "artefact", "profile.json", "recipe.json", "results.jsonl", "talk.kvist"}


def test_one_file_of_each_kind_is_kept():
    assert {path.name for path in LAST.iterdir()} == KINDS
    assert sum(path.stat().st_size for path in LAST.rglob("*")) < 1 << 17


def test_an_artefact_is_read_and_codes():
    artefact = Artifact.load(LAST / "artefact")
    recipe = parse(f"kvquant artifact={LAST / 'artefact'}")
    assert artefact.settings.bits == 2 and artefact.model.layers == len(recipe.layers) == 6 and not recipe.needs
    codec = recipe.layers[0].value.codec
    x = torch.randn(artefact.model.heads, 64, artefact.model.value_dim, generator=torch.Generator().manual_seed(0))
    read = codec.decode(codec.encode(x))
    assert read.shape == x.shape and torch.isfinite(read).all() and not torch.equal(read, x)


def test_an_allocation_is_read_and_serves_its_model():
    allocation = kvist.Allocation.load(LAST / "allocation.json")
    assert (allocation.k, allocation.v) == ((2, 2, 4, 4, 4, 2), (2, 4, 2, 4, 2, 2))
    assert allocation.model == Artifact.load(LAST / "artefact").model
    recipe = get("kivi", allocation=LAST / "allocation.json")
    assert [plan.key.codec.levels.bits for plan in recipe.layers] == list(allocation.k)


def test_a_profile_is_read_and_ranks():
    profile = Profile.load(LAST / "profile.json")
    (changes,) = profile.loss_change
    assert profile.model.layers == 6 and profile.origin.samples == 2 and changes.method == "kivi"
    for side in ("k", "v"):
        assert profile.norms(side).shape == (6,) and np.all(changes.at(side, 2) > changes.at(side, 4))


def test_a_recipe_is_read_and_is_what_the_method_makes_today():
    recipe = kvist.Recipe.load(LAST / "recipe.json")
    assert recipe == get("kivi", k=(4, 2), v=2, recent=32)


def test_results_are_read_gone_on_from_and_reported(tmp_path):
    copy = tmp_path / "results.jsonl"
    copy.write_bytes((LAST / "results.jsonl").read_bytes())
    rows = [row for cell in Results(copy).rows.values() for row in cell]
    assert {row.method for row in rows} == {"exact", "kivi:2"} and {row.task for row in rows} == {"fidelity"}
    (group,) = load(tmp_path)
    assert {entry.method for entry in group.entries} == {"exact", "kivi:2"} and group.items == 2
    assert copy.read_bytes() == (LAST / "results.jsonl").read_bytes()


def test_a_cache_of_an_older_format_is_refused_by_name():
    model = tiny_llama(layers=1, dim=16, kv_heads=1)
    with pytest.raises(
        ValueError, match=r"talk\.kvist is a cache of format 2, and this release of kvist reads format 3; read the"
    ):
        kvist.Cache.load(LAST / "talk.kvist", model)
