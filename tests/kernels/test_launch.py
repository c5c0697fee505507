"""Launches bind and compile as they would on a GPU: arguments of every type, and no new compilation as a context grows.

In a process of its own, where Triton is no interpreter, with a driver that compiles for sm_90 and launches nothing.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from dataclasses import replace
import torch
from kvist.testing.cases import recipe
from kvist.cache import step
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.cache.view import View
from kvist.kernels.triton.ahead import absent
from kvist.kernels.triton.attend import decode_kernel
from kvist.kernels.triton.decode import decode
from kvist.kernels.triton.step import step as advance, step_kernel
from kvist.kernels.choose import choose
from kvist.kernels.contract import Decode, Operation

launched, counts, gpu = [], [], absent(90)
for kernel in (decode_kernel, step_kernel):
    kernel.add_pre_run_hook(lambda *args, **options: launched.append(args))
gpu.__enter__()
for text, dtype in json.loads(sys.argv[1]):
    made, rows = recipe(text, 64, prefill="stored"), Rows()
    layer = Layer(made.layers[0], made.page, "stored", 0, rows)
    key, value = None, None
    for tokens in (230, 1, 1500, 1):
        rows.extend(2, tokens, None)
        layer.update(*(torch.randn(2, 2, tokens, 64).to(getattr(torch, dtype)) for _ in range(2)))
        key, value = layer.tracks
        view, q = View.after(layer), torch.randn(2, 6, 1, 64).to(getattr(torch, dtype))
        traits = key.codec.traits, value.codec.traits
        origins = [0, 0] if key.codec.transform.fixed else view.stand.origins()
        numbers = step.state(layer, origins), step.counters(layer, 6, 1), layer.page, 0.125, None
        call = Decode(*numbers, view.skip, step.pinned(layer))
        sides = step.stored(layer)
        decode(*traits, q, *sides, step.exact(key), step.exact(value), call)
        if choose(Operation.STORE, replace(layer.request, interpreted=True)).run:
            x, state = torch.randn(2, 2, 1, 64).to(q.dtype), torch.zeros(2, 6, dtype=torch.int32)
            rings, pools = (key.exact.ring, value.exact.ring), (key.pool.arrays, value.pool.arrays)
            tables, constants = tuple(s.table for s in sides), tuple(s.constants for s in sides)
            advance(*traits, x, x, rings, pools, tables, constants, state, layer.page, (64, 64))
        counts.append([len(kernel.device_caches["sm_90"][0]) for kernel in (decode_kernel, step_kernel)])
print(json.dumps({"launched": len(launched), "variants": counts}))
"""


def test_arguments_bind_and_nothing_is_compiled_twice():
    pytest.importorskip("triton")
    settings = [["kivi:2 recent=32", "float16"], ["logquant window=32 sinks=2", "bfloat16"], ["kvquant:3", "float16"]]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    answer = json.loads(found.stdout.splitlines()[-1])
    assert answer["launched"] == 4 * 3 + 4 * 2
    assert answer["variants"] == [[1, 1]] * 4 + [[2, 2]] * 4 + [[3, 2]] * 4  # attending, and writing a token
