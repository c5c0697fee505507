"""`tp_plan="auto"` on two gloo ranks: each rank stores its own heads, and the tokens are those of one process."""

import json
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from models_tiny import llama_config, sharpen, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import kvist
from kvist.models.compat import cache_argument

OPTIONS = {"max_new_tokens": 24, "do_sample": False}
METHOD = "kivi:2 recent=32"


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(rank: int, folder: str, port: int) -> None:
    """One of two ranks: generate, attached and not, and write down what came out."""
    warnings.simplefilter("ignore")  # of process groups; this process has its own filters
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    written = []
    for attached in (False, True):
        if attached:
            kvist.attach(model)
        cache = kvist.Cache(model, METHOD)
        written.append(model.generate(tokens(1, 150), **cache_argument(cache), **OPTIONS).tolist())
    found = {"tokens": written, "heads": cache.inner.ours[0].shape.heads, "packed": cache.report().packed}
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_two_ranks_give_the_tokens_of_one_process(tmp_path):
    model = sharpen(LlamaForCausalLM._from_config(llama_config(vocab_size=102), dtype=torch.float32))
    expected = model.generate(tokens(1, 150), **cache_argument(kvist.Cache(model, METHOD)), **OPTIONS).tolist()
    model.save_pretrained(tmp_path)
    torch.multiprocessing.spawn(_rank, (str(tmp_path), _port()), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["tokens"] == [expected, expected]
        assert found["heads"] == model.config.num_key_value_heads // 2, "each rank stores half of the heads"
        assert found["packed"] > 75
