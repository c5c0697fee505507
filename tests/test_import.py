"""`import kvist` is free: nothing heavy is imported, nothing is patched until a model is attached."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kvist

HEAVY = ("triton", "matplotlib", "vllm", "numba")

WATCH = """
import json, sys
import torch, torch.nn.functional as F
from transformers import masking_utils, modeling_utils, cache_utils
from transformers.models.llama import modeling_llama

def state():
    spaces = (F, torch, torch.Tensor, torch.nn.Module, cache_utils.Cache, cache_utils.DynamicLayer, masking_utils,
              modeling_utils.PreTrainedModel, modeling_llama, modeling_llama.LlamaAttention)
    names = {f"{i}.{name}": id(value)
             for i, space in enumerate(spaces) for name, value in vars(space).items() if callable(value)}
    names["attention"] = sorted(modeling_utils.ALL_ATTENTION_FUNCTIONS.keys())
    names["masks"] = sorted(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.keys())
    hooks = torch.nn.modules.module
    names["hooks"] = [len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks)]
    names["layers"] = sorted(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)
    return names

before, loaded = state(), set(sys.modules)
import kvist
kvist.Cache, kvist.Recipe, kvist.attach, kvist.detach
from kvist.methods import names
names()
after = state()
changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
print(json.dumps({"changed": changed, "new": sorted({name.partition(".")[0] for name in set(sys.modules) - loaded})}))
"""


def fresh(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_bare_import_loads_neither_torch_nor_anything_heavy():
    loaded = set(json.loads(fresh("import kvist, sys, json; print(json.dumps(sorted(sys.modules)))")))
    assert not loaded & {*HEAVY, "torch", "transformers"}


def test_using_the_front_door_patches_nothing_and_loads_nothing_heavy():
    found = json.loads(fresh(WATCH))
    assert found["changed"] == []
    assert not set(found["new"]) & set(HEAVY)


def test_the_front_door_names_what_it_offers():
    assert fresh("import kvist; print(all(callable(getattr(kvist, name)) for name in kvist.__all__))") == "True\n"
    with pytest.raises(AttributeError, match="nothing"):
        kvist.nothing  # noqa: B018


def test_the_wheel_is_light():
    """What goes into the wheel, packed as it packs it, is half a megabyte with room for the wheel's own files."""
    root = Path(kvist.__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 100
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in files:
            wheel.write(path, path.relative_to(root.parent))
    assert packed.tell() < (1 << 19) - (24 << 10)
