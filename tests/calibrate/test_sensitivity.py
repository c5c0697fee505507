"""A profile's numbers against slow sums over plain autograd; what is refused; a run that is interrupted."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from artifacts import made
from families.zoo import tiny
from models_tiny import tiny_llama, tokens

from kvist.calibrate.profile import Profile, spearman
from kvist.calibrate.sensitivity import _error, profile
from kvist.coding import Identity
from kvist.methods import parse
from kvist.methods.kvquant import recipe
from kvist.models.rope import rotary
from kvist.models.taps import listen, listen_back

PROMPTS = [tokens(1, n, seed=n)[0] for n in (70, 64, 99, 80)]  # of different lengths: none is padded
ABOUT = {"source": "a", "digest": "b", "seed": 3}


def profiled(tmp_path, model=None, prompts=PROMPTS, methods=None, **more) -> Profile:
    methods = methods or {"kivi recent=32": (2, 3)}
    return profile(model or tiny_llama(), prompts, methods, out=tmp_path / "profile.json", **ABOUT, **more)


def test_gradient_norms_are_those_of_the_mean_loss(tmp_path):
    model, found = tiny_llama(), profiled(tmp_path)
    for i, ids in enumerate(PROMPTS):
        twin = copy.deepcopy(model).requires_grad_(True)
        logits = twin(ids.unsqueeze(0), use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], ids[1:]).backward()
        for layer, block in enumerate(twin.model.layers):
            for side, module in (("k", block.self_attn.k_proj), ("v", block.self_attn.v_proj)):
                wanted = module.weight.grad.norm().item()
                assert getattr(found.gradient_norm, side)[layer][i] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", ["kivi recent=32", "hadamard", "kivi recent=32 sinks=5"])
def test_loss_changes_are_sensitivity_times_error_of_other_prompts(tmp_path, method):
    """Half of F·E, summed over channels and tokens: F of the other half's prompts, E of the codec itself."""
    model, found = tiny_llama(), profiled(tmp_path, methods={method: (2, 4)})
    gradients, errors = {}, {}
    for i, ids in enumerate(PROMPTS):

        def note(layer, side, x, gradient, i=i):
            gradients[layer, side, i] = gradient[0].square().sum(1).flatten() / (x.shape[2] - 1)
            for bits in (2, 4):
                part = parse(f"{method} k={bits} v={bits}").layers[0].sides[side]
                behind = x[:, :, part.retention.sinks :]
                whole = behind[:, :, : behind.shape[2] // part.codec.granule * part.codec.granule]
                read = part.codec.decode(part.codec.encode(whole))
                errors[layer, side, i, bits] = (read - whole)[0].square().mean(1).flatten()

        listen_back(model, ids.unsqueeze(0), note)
    changes = found.loss_change[0]
    assert (changes.method, changes.choices) == (method, (2, 4))
    for (layer, side, i, bits), error in errors.items():
        others = [gradients[layer, side, j] for j in range(len(PROMPTS)) if j % 2 != i % 2]
        wanted = 0.5 * (torch.stack(others).mean(0) * error).sum().item()
        scores = (changes.k, changes.v)[side]
        assert scores[layer][changes.choices.index(bits)][i] == pytest.approx(wanted, rel=1e-4)


def test_keys_before_rope_are_measured_where_they_are_coded():
    """A rotation keeps lengths: summed over channels, the error is that of the codec on keys turned back."""
    model = tiny_llama()
    plan = recipe(made(model=model)).layers[0].key
    bare = plan.codec.model_copy(update={"transform": Identity()})
    found = []

    def note(layer, side, x, gradient):
        if (layer, side) == (0, 0):
            turned = rotary(model).forward(x[:, :, 1:], torch.arange(1, x.shape[2]).unsqueeze(0))
            wanted = (bare.decode(bare.encode(turned)) - turned)[0].square().mean(1).sum().item()
            found.append((_error(plan, x).sum().item(), wanted))

    listen(model, PROMPTS[0].unsqueeze(0), note)
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-3) and found[0][1] > 0.01


def test_wider_codes_change_the_loss_less(tmp_path):
    changes = profiled(tmp_path, methods={"kvmix": (1, 2, 3, 4, 8)}).loss_change[0]
    for side in ("k", "v"):
        means = np.stack([changes.at(side, bits) for bits in changes.choices])
        assert (np.diff(means, axis=0) < 0).all() and (means > 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": PROMPTS[:1]}, "2 prompts or more"),
        ({"prompts": [PROMPTS[0], tokens(1, 31)[0]]}, "a prompt has 31 tokens, 'kivi recent=32' codes 32 at once"),
        ({"methods": {"int4": (2,)}}, "int4 has no option 'k'"),
        ({"methods": {"kvquant": (3,)}}, "kvquant needs"),
    ],
)
def test_refusals(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        profiled(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_half_precision_whose_gradients_underflow_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"float16.*bfloat16 or float32"):
        profiled(tmp_path, tiny("llama", "sdpa", torch.float16))
    near, exact = profiled(tmp_path, tiny("llama", "sdpa", torch.bfloat16)), profiled(tmp_path, tiny("llama", "sdpa"))
    assert np.allclose(near.norms("k"), exact.norms("k"), rtol=0.1)


def test_an_interrupted_profile_goes_on(tmp_path):
    whole = profiled(tmp_path)
    (tmp_path / "profile.json").unlink()
    shown = []

    def stop(stage, done, total):
        shown.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiled(tmp_path, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json.progress"]
    assert profiled(tmp_path, progress=lambda stage, done, total: shown.append(done)) == whole
    assert shown == [1, 2, 3, 4] and [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_progress_belongs_to_what_an_artefact_holds_not_to_its_name(tmp_path):
    """Calibrated anew between two runs, its errors are other ones."""
    model, methods = tiny_llama(), {f"kvquant artifact={tmp_path / 'fit'}": (2,)}
    out, shown = tmp_path / "out", []
    out.mkdir()

    def stop(stage, done, total):
        raise KeyboardInterrupt

    def show(stage, done, total):
        shown.append(done)

    made(model=model, bits=2).save(tmp_path / "fit")
    with pytest.raises(KeyboardInterrupt):
        profiled(out, model, methods=methods, progress=stop)
    shutil.rmtree(tmp_path / "fit")
    made(model=model, bits=2, sinks=3).save(tmp_path / "fit")
    profiled(out, model, methods=methods, progress=show)
    assert shown == [1, 2, 3, 4]


def test_the_file(tmp_path):
    found, path = profiled(tmp_path), tmp_path / "profile.json"
    assert Profile.load(path) == found
    data = json.loads(path.read_text())
    summary = data["summary"]
    norms = np.array(data["gradient_norm"]["k"])
    assert summary["gradient_norm"]["k"]["mean"] == pytest.approx(norms.mean(1), rel=1e-5)
    assert summary["gradient_norm"]["k"]["variance"] == pytest.approx(norms.var(1, ddof=1), rel=1e-5)
    assert data["origin"]["digest"] == "b" and data["model"]["layers"] == 2
    for place, value, words in (
        ("gradient_norm", -1.0, "profile: scores of k must be numbers of at least 0"),
        ("gradient_norm", float("nan"), "it has the number NaN"),
    ):
        torn = copy.deepcopy(data)
        torn[place]["k"][0][0] = value
        path.write_text(json.dumps(torn))
        with pytest.raises(ValueError, match=words):
            Profile.load(path)
    path.write_text(json.dumps(data | {"model": data["model"] | {"heads": 0}}))
    with pytest.raises(ValueError, match=r"model\.heads: .*greater than 0"):
        Profile.load(path)
    data["gradient_norm"]["k"][0].pop()
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"profile.json is no valid profile: .*different lengths"):
        Profile.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no profile of format 1"):
        Profile.load(path)
    with pytest.raises(ValueError, match=r"expected a profile.*`kvist profile` makes one"):
        Profile.load(tmp_path / "absent.json")


def test_rank_correlation():
    """By hand: d² sums to 2 of 6 ranks, 1 - 6·2/(4·15) = 0.8; ties share their mean rank."""
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30])) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 2, 3]), np.array([-1.0, -2, -3])) == pytest.approx(-1)
    assert spearman(np.array([1, 1, 2]), np.array([3, 4, 5])) == pytest.approx(3**0.5 / 2)
    assert spearman(np.array([1, 1]), np.array([3, 4])) == 1.0


def test_a_ranking_that_halves_do_not_share_is_named(tmp_path):
    found = profiled(tmp_path)
    norms = found.gradient_norm.model_copy(update={"k": ((1.0, 2.0, 1.0, 2.0), (2.0, 1.0, 2.0, 1.0))})
    torn = found.model_copy(update={"gradient_norm": norms})
    assert torn.stability()["gradient-norm"]["k"] == pytest.approx(-1)
    assert any("keys by gradient-norm is not stable" in words for words in torn.unstable)
    steady = norms.model_copy(update={"k": ((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0))})
    kept = found.model_copy(update={"gradient_norm": steady}).unstable
    assert not any("keys by gradient-norm" in words for words in kept)
