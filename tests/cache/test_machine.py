"""Any sequence of appends, crops, beams, saves and loads: what the cache holds is what the oracle holds.

`--sequences N` says how many sequences are run in all; more than the default are drawn at random.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from dials import SEQUENCES
from hypothesis import HealthCheck, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models_tiny import tiny_llama
from oracle import OracleCache
from shadow import same, same_attention, turn_further

import kvist
from kvist.cache.handle import Handle
from kvist.cache.view import View
from kvist.testing.cases import recipe

DIM = 40  # the last group along channels is shorter
CASES = [
    "exact",
    "int4 group=16",
    "hadamard k=2 v=3 group=16 recent=32",
    "kivi:2 recent=32",
    "kivi k=3 v=4 recent=40 sinks=3",
    "kivi k=1 v=8 group=64 recent=64 values=block",
    "streaming window=40",
    "logquant window=32",
    "partial-logquant window=40 sinks=2",
    "partial-streaming window=40 sinks=3",
    "kvmix k=3,2 v=4,1",
    "kvmix:2 ratio_of=context ratio=0.3",
    "kvquant:2 outliers=12% sinks=3",
    "kvquant:3 recent=40",
]
SEEDS = st.integers(0, 2**16)
COUNTS = st.one_of(st.just(1), st.integers(1, 80))


class Machine(RuleBasedStateMachine):
    """Rows of random keys and values given to a kvist cache and to the oracle."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.layers = 2 if "," in text else 1
        self.model = tiny_llama(layers=self.layers, dim=DIM)

    @initialize(prefill=st.sampled_from(["exact", "stored"]), reserve=st.sampled_from([0, 0, 150]))
    def start(self, prefill, reserve):
        self.recipe = recipe(self.text, DIM, prefill=prefill)
        self.cache = kvist.Cache(self.model, self.recipe, reserve=reserve)
        self.oracle = OracleCache(self.recipe, self.layers)
        self.real = torch.ones(0, 0, dtype=torch.bool)
        self.empty = True

    @property
    def slots(self) -> int:
        return self.real.shape[1]

    @precondition(lambda self: self.empty)
    @rule(pads=st.lists(st.integers(0, 79), max_size=2), count=COUNTS, seed=SEEDS)
    def first(self, pads, count, seed):
        """One full row, and up to two that are padded on the left."""
        self.real = torch.ones(1 + len(pads), 0, dtype=torch.bool)
        self.empty = False
        self._append([0, *pads], count, seed)

    @precondition(lambda self: not self.empty)
    @rule(count=COUNTS, seed=SEEDS)
    def append(self, count, seed):
        self._append([0] * len(self.real), count, seed)

    @precondition(lambda self: not self.empty and len(self.real) > 1)
    @rule(pad=st.integers(1, 40), count=COUNTS, seed=SEEDS)
    def turn(self, pad, count, seed):
        """A later turn, shorter in all rows but one."""
        self._append([0] + [pad] * (len(self.real) - 1), count, seed)

    def _append(self, pads: list[int], count: int, seed: int) -> None:
        new = torch.stack([torch.arange(count) >= min(pad, count) for pad in pads])
        self.real = torch.cat([self.real, new], 1)
        self.oracle.mask = self.real
        mask = None if bool(self.real.all()) and seed % 2 else self.real.long()
        self.cache.announce(len(pads), count, mask)
        generator = torch.Generator().manual_seed(seed)
        for layer in range(self.layers):
            keys, values = torch.randn(2, len(pads), 2, count, DIM, generator=generator)
            given = self.cache.update(keys, values, layer)
            wanted = self.oracle.update(keys, values, layer)
            for found, want, side in zip(given, wanted, self.cache.layers[layer].plan.sides, strict=True):
                found = found.dense() if isinstance(found, Handle) else found
                same(found.masked_fill(~self.real[:, None, :, None], 0), want, side)
            if isinstance(given[0], Handle):
                query = torch.randn(len(pads), 4, count, DIM, generator=generator)
                turned = turn_further(wanted[0], self.oracle.layers[layer])
                same_attention(given[0].source.attend(query, DIM**-0.5), query, *wanted, self.real, turned)

    @precondition(lambda self: not self.empty)
    @rule(depth=st.one_of(st.integers(1, 33), st.integers(1, 200)))
    def crop(self, depth):
        self.cache.crop(-depth)
        self.oracle.crop(-depth)
        self.real = self.real[:, : max(0, self.slots - depth)]

    @precondition(lambda self: not self.empty)
    @rule(data=st.data())
    def reorder(self, data):
        rows = len(self.real)
        self._pick("reorder_cache", data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))

    @precondition(lambda self: not self.empty and len(self.real) > 1)
    @rule(data=st.data())
    def select(self, data):
        rows = len(self.real)
        self._pick("batch_select_indices", data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows)))

    def _pick(self, name: str, rows: list[int]) -> None:
        for cache in (self.cache, self.oracle):
            getattr(cache, name)(torch.tensor(rows))
        self.real = self.real[rows]

    @precondition(lambda self: not self.empty and len(self.real) <= 2)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.oracle.batch_repeat_interleave(2)
        self.real = self.real.repeat_interleave(2, 0)

    @rule()
    def deepcopy(self):
        self.cache, old = copy.deepcopy(self.cache), self.cache
        old.reset()  # must not reach the copy

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            self.cache.save(path)
            self.cache = kvist.Cache.load(path, self.model)

    @rule()
    def reset(self):
        self.cache.reset()
        self.oracle.reset()
        self.real, self.empty = torch.ones(0, 0, dtype=torch.bool), True

    @invariant()
    def holds_what_the_oracle_holds(self):
        if not hasattr(self, "cache") or self.empty:
            return
        for layer, want in zip(self.cache.layers, self.oracle.layers, strict=True):
            assert layer.slots == want.slots == self.slots
            for row, lengths in enumerate(layer.lengths):
                assert lengths == int(self.real[row].sum())
                for track, stream in zip(layer.tracks, want.rows[row].streams, strict=True):
                    assert track.states[row].frontier == stream.frontier
                    assert set(track.exact.pins[row]) == stream.pinned
            for track in layer.tracks:
                held = [page for table in track.pool.tables for page in table]
                assert [held.count(page) for page in range(track.pool.capacity)] == track.pool.refs
            if self.slots:
                for side, wanted in enumerate(want.read()):
                    same(View.after(layer).dense(side), wanted, layer.plan.sides[side])


@pytest.mark.parametrize("text", CASES)
def test_any_sequence(text, sequences):
    run_state_machine_as_test(
        partial(Machine, text),
        settings=settings(
            max_examples=-(-sequences // len(CASES)),
            stateful_step_count=12,
            deadline=None,
            database=None,
            derandomize=sequences <= SEQUENCES,
            verbosity=Verbosity.normal,
            suppress_health_check=list(HealthCheck),
        ),
    )
