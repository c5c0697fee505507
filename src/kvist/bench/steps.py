"""`kvist bench steps`: what a step of `generate` costs the host, per token and layer, where arithmetic is nothing."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from kvist.attention import attach
from kvist.baselines import DYNAMIC
from kvist.bench.reports import Steps
from kvist.bench.table import machine, show
from kvist.cache.cache import Cache
from kvist.methods import parse
from kvist.models.compat import cache_argument
from kvist.testing.stand_in import stand_in

LAYERS, KV_HEADS, DIM, VOCABULARY = 32, 2, 16, 64
PROMPT = 100
METHODS = ("exact", "int4", "hadamard:4", "kivi:2", "logquant:2", "kvmix:2", "kvquant:3")


class Spent(NamedTuple):
    """Seconds of a token: of the process, on all its cores, and by the clock."""

    process: float
    wall: float

    @classmethod
    def now(cls) -> "Spent":
        return cls(time.process_time(), time.perf_counter())


class Clock:
    """Looks at the time after each token; told as a stopping criterion, it never stops."""

    def __init__(self, batch: int):
        self.going, self.times = torch.zeros(batch, dtype=torch.bool), []

    def __call__(self, ids: Tensor, scores, **kwargs) -> Tensor:
        self.times.append(Spent.now())
        return self.going

    def tokens(self) -> list[Spent]:
        """Of each token after the first, which the prompt gives."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [Spent(*(b - a for a, b in zip(*pair, strict=True))) for pair in pairs]


class Run(NamedTuple):
    """What is generated, how often, and on how many threads."""

    batch: int = 1
    tokens: int = 25
    rounds: int = 8
    threads: int = 1
    seed: int = 0


ONCE = Run()


def run(
    methods: Sequence[str] = METHODS, asked: Run = ONCE, out: str | Path | None = None, as_json: bool = False
) -> dict:
    """Medians over the tokens of all rounds: greedy tokens of a random Llama of 32 tiny layers, contenders in turn;
    printed, and kept in `out`. Rows of a batch are padded on the left, to different lengths.

    Raises ValueError for an unknown method.
    """
    batch, tokens, rounds, threads, seed = asked
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(seed)
        model, prompt = _model(), _prompt(batch)
        room = PROMPT + tokens
        made: dict[str, Callable] = {"dynamic": lambda: DYNAMIC.cache(model.config)}
        made["static"] = lambda: StaticCache(config=model.config, max_cache_len=room)
        for text in methods:
            recipe = stand_in(parse(text), KV_HEADS, DIM)
            made[f"kvist {text}"] = lambda recipe=recipe: Cache(model, recipe)
        for make in made.values():  # what is compiled once per machine is compiled here
            _generate(model, prompt, make(), tokens)
        spent: dict[str, list[Spent]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, make in made.items():
                spent[name] += _generate(model, prompt, make(), tokens)
    finally:
        torch.set_num_threads(before)
    base = _medians(spent["dynamic"])
    rows = [_row(name, batch, _medians(found), base) for name, found in spent.items()]
    title = (
        f"A step of generate: {LAYERS} layers of {KV_HEADS} KV heads of {DIM}, batch {batch}"
        f"{', left-padded' if batch > 1 else ''}, {PROMPT} + {tokens} tokens, {threads} threads"
    )
    report = {"bench": "steps", "title": title, "machine": machine(), "seed": seed, "rows": rows}
    Steps.model_validate(report).save(out)
    show(report, as_json)
    return report


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, head_dim=DIM, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.generation_config.disable_compile = True
    return model


def _prompt(batch: int) -> dict[str, Tensor]:
    """Token ids and mask, (B, PROMPT)."""
    ids = torch.randint(1, VOCABULARY, (batch, PROMPT))
    pads = torch.arange(batch).unsqueeze(-1) * (PROMPT // 2) // max(1, batch)
    mask = (torch.arange(PROMPT) >= pads).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@contextmanager
def _using(model, cache) -> Iterator[None]:
    """Meanwhile the model is attached if the cache is ours; afterwards the cache has stopped listening."""
    with attach(model) if isinstance(cache, Cache) else nullcontext():
        try:
            yield
        finally:
            if isinstance(cache, Cache):
                cache.close()


def _generate(model, prompt: dict[str, Tensor], cache, tokens: int) -> list[Spent]:
    clock = Clock(len(prompt["input_ids"]))
    with _using(model, cache), torch.no_grad():
        model.generate(
            **prompt, **cache_argument(cache), max_new_tokens=tokens, do_sample=False, stopping_criteria=[clock]
        )
    return clock.tokens()


def _medians(found: list[Spent]) -> Spent:
    return Spent(*map(statistics.median, zip(*found, strict=True)))


def _row(name: str, batch: int, spent: Spent, base: Spent) -> dict:
    return {
        "contender": name,
        "batch": batch,
        "process ms": 1e3 * spent.process,
        "wall ms": 1e3 * spent.wall,
        "layer us": 1e6 * spent.process / LAYERS,
        "x dynamic": spent.process / base.process,
        "wall x dynamic": spent.wall / base.wall,
    }
