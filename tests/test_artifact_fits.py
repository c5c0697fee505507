"""Where an artefact comes from, and which models it is for."""

import copy

import huggingface_hub
import pytest
import torch
from artifacts import made
from models_tiny import llama_config, sharpen, tiny_llama, tokens
from transformers import LlamaForCausalLM

import kvist
from kvist.artifact import JSON, TENSORS, Artifact
from kvist.methods.kvquant import recipe
from kvist.models.compat import cache_argument


class Hub:
    """Repositories in memory."""

    def __init__(self):
        self.files, self.created = {}, []

    def create_repo(self, repository, exist_ok):
        assert exist_ok
        self.created.append(repository)

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        from pathlib import Path

        self.files[repo_id] = {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns}
        self.message = commit_message
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()

    def download(repository, allow_patterns):
        if repository not in hub.files:
            raise RuntimeError(f"404: no such repository\nrequest {repository}")
        folder = tmp_path / "snapshot"
        folder.mkdir(exist_ok=True)
        for name in allow_patterns:
            (folder / name).write_bytes(hub.files[repository][name])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return hub


def test_push_and_find(hub, tmp_path, monkeypatch):
    artifact = made("fp16", bits=4)
    assert artifact.push("me/nuq4") == "https://hub/me/nuq4/commit/1"
    assert hub.created == ["me/nuq4"] and hub.files["me/nuq4"].keys() == {JSON, TENSORS}
    assert hub.message.startswith("nuq4-5% for ") and "2 layers, 2 KV heads of 32" in hub.message
    assert Artifact.find("me/nuq4") == artifact
    assert kvist.Cache(tiny_llama(), "kvquant", artifact="me/nuq4").recipe == recipe(artifact)
    monkeypatch.chdir(tmp_path)
    made("fp16", bits=2).save("me/nuq4")  # a folder goes first
    assert Artifact.find("me/nuq4").settings.bits == 2


@pytest.mark.parametrize("place", ["me/none", "./me/none", "none", "/none/of/it", "a/b/c", "~/none"])
def test_what_is_nowhere(place, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="404: no such repository$" if place == "me/none" else "No such file"
    ) as caught:
        Artifact.find(place)
    assert place.lstrip("./") in str(caught.value)


def changed(**options):
    return sharpen(LlamaForCausalLM._from_config(llama_config(**options), dtype=torch.float32))


def yarn(factor: float) -> dict:
    parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": factor}
    return {"rope_parameters": parameters | {"original_max_position_embeddings": 8192 / factor}}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("2 layers, this model has 3", {"layers": 3}),
        ("2 KV heads, this model has 1", {"kv_heads": 1}),
        ("heads of 32, this model has heads of 16", {"dim": 16}),
        ("config differs", {"intermediate_size": 100}),
        ("config differs", {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("config differs", yarn(4.0)),
    ],
)
def test_another_model_is_refused_with_the_reason(words, options, tmp_path):
    made().save(tmp_path)
    with pytest.raises(ValueError, match=f"does not fit.*made for .*{words}.*calibrate") as caught:
        kvist.Cache(changed(**options), f"kvquant artifact={tmp_path}")
    assert "\n" not in str(caught.value)


def test_another_yarn_factor_is_refused(tmp_path):
    made(model=changed(**yarn(4.0))).save(tmp_path)
    kvist.Cache(changed(**yarn(4.0)), f"kvquant artifact={tmp_path}")
    with pytest.raises(ValueError, match=r"does not fit: the model's rotary embedding differs; calibrate"):
        kvist.Cache(changed(**yarn(8.0)), f"kvquant artifact={tmp_path}")


def test_another_family_is_refused(tmp_path):
    other = made()
    other = other.model_copy(update={"model": other.model.model_copy(update={"kind": "qwen3"})})
    other.save(tmp_path)
    with pytest.raises(ValueError, match="a qwen3 model, this model has a llama model"):
        kvist.Cache(tiny_llama(), f"kvquant artifact={tmp_path}")


def test_a_fine_tuned_model_is_accepted_and_served(tmp_path):
    made().save(tmp_path)
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.config._name_or_path = "someone/else"
    model.config.attention_dropout = 0.1
    cache = kvist.Cache(model, "kvquant", artifact=str(tmp_path))
    with torch.no_grad():
        model(tokens(1, 100), **cache_argument(cache))
        assert model(tokens(1, 1), **cache_argument(cache)).logits.isfinite().all()
    assert cache.report().packed > 0
