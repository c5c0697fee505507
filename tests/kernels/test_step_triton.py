"""One launch per decode step writes what the reference writes: rings and pools are equal bit for bit."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from asking import ask

from kvist.cache.exact import Exact
from kvist.cache.pages import Pool
from kvist.coding import AbsMax, Codec, Fixed, Grouping, Hadamard, Raw, Slots, Table, Uniform, Unrotate
from kvist.methods.parts import per_channel, per_token
from kvist.types import MIN_PAGE

pytest.importorskip("triton")
with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
    from kvist.kernels.triton.step import step

CPU, HEADS, CAPACITY, WIDTH = torch.device("cpu"), 2, 160, 5
POINTS = (-1.0, -0.6, -0.25, -0.1, 0.05, 0.3, 0.7, 1.0)


class _Side:
    """What one side stores: its ring, and a pool whose pages are handed out in some order."""

    def __init__(self, codec, dim, starts, dtype, page):
        self.codec, self.dim, self.page = codec, dim, page
        self.exact = Exact(len(starts), HEADS, dim, 0, 0, dtype, CPU)
        self.exact.resize(CAPACITY, [0] * len(starts), [0] * len(starts))
        self.exact.ring.zero_()
        self.pool = Pool(codec.layout(HEADS, dim, dtype), HEADS, page, CPU, len(starts))
        self.pool.resize(WIDTH * len(starts))
        for array in self.pool.arrays.values():
            array.zero_()
        self.pool.free = torch.randperm(WIDTH * len(starts), generator=torch.Generator().manual_seed(3)).tolist()
        self.clipped = torch.zeros((), dtype=torch.long)
        for row in range(len(starts)):
            self.pool.extend(row, 0, WIDTH * page)

    def pack(self, row, start, count):
        """As `Track` does it, by the reference."""
        x = self.exact.get([row], start, start + count)
        codec = self.codec
        arrays = codec.encode(x) if codec.raw else codec._reference(codec.transform.forward(x.float()))
        self.clipped += arrays.pop("clipped", 0)
        self.pool.write([row], [start], arrays)


def _table():
    return Table(bits=3, points=POINTS)


def _fixed(dim):
    span = torch.linspace(0.5, 2, HEADS * dim)
    return Fixed(low=tuple((-span).tolist()), high=tuple(span.tolist()))


CODECS = {
    "channel": lambda dim: per_channel(2, 32),
    "channel, long": lambda dim: per_channel(3, 128),
    "channel, odd": lambda dim: per_channel(4, 40),
    "token": lambda dim: per_token(4),
    "groups": lambda dim: per_token(1, 32),
    "hadamard": lambda dim: per_token(3, 32).model_copy(update={"transform": Hadamard()}),
    "all heads": lambda dim: Codec(levels=_table(), grouping=Grouping(along="channels", across_heads=True)),
    "fixed": lambda dim: Codec(levels=_table(), grouping=Grouping(along="channels"), range=_fixed(dim)),
    "fixed, even": lambda dim: Codec(levels=Uniform(bits=8), grouping=Grouping(along="channels"), range=_fixed(dim)),
    "symmetric": lambda dim: Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels"), range=AbsMax()),
    "raw": lambda dim: Codec(levels=Raw(), grouping=Grouping(along="channels")),
}


@pytest.mark.parametrize(
    ("key", "value", "dim", "value_dim", "dtype"),
    [
        ("channel", "groups", 64, 64, torch.float16),
        ("channel, long", "token", 128, 96, torch.bfloat16),
        ("channel, odd", "raw", 40, 64, torch.float32),
        ("hadamard", "hadamard", 80, 128, torch.float16),
        ("fixed", "all heads", 96, 64, torch.float16),
        ("raw", "fixed, even", 64, 256, torch.bfloat16),
        ("all heads", "symmetric", 80, 64, torch.float32),
    ],
)
def test_steps_write_what_the_reference_writes(key, value, dim, value_dim, dtype):
    generator = torch.Generator().manual_seed(dim + value_dim)
    codecs, dims, held = (CODECS[key](dim), CODECS[value](value_dim)), (dim, value_dim), [37, 0, 131]
    page = max(MIN_PAGE, *(c.granule if c.granule % MIN_PAGE in (0, 32) else 2 * c.granule for c in codecs))
    ours, theirs = ([_Side(c, d, held, dtype, page) for c, d in zip(codecs, dims, strict=True)] for _ in range(2))
    state, most = torch.zeros(3, 6, dtype=torch.int32), tuple(max(c.granule, 3) for c in codecs)
    most = tuple(-(-m // c.granule) * c.granule for m, c in zip(most, codecs, strict=True))
    for row, count in enumerate(held):
        for d, *sides in zip(dims, ours, theirs, strict=True):
            x = torch.randn(1, HEADS, count, d, generator=generator).to(dtype)
            for side in sides:
                side.exact.put([row], 0, x)
    positions, frontiers = list(held), [[0, 0] for _ in held]
    for number in range(9):
        new = [torch.randn(3, HEADS, 1, d, generator=generator).to(dtype) for d in dims]
        state.zero_()
        for row in range(3):
            skipped = row == 1 and number == 4  # a row that has ended, or whose token is a sink
            state[row, 0] = -1 if skipped else positions[row]
            for s, codec in enumerate(codecs):
                start = frontiers[row][s]
                whole = (positions[row] - start) // codec.granule * codec.granule
                count = min(whole, most[s]) if number % 2 == s or codec.granule == 1 else 0
                state[row, 1 + 2 * s], state[row, 2 + 2 * s] = start, count
                if count:
                    theirs[s].pack(row, start, count)
                frontiers[row][s] += count
                if not skipped:
                    theirs[s].exact.put([row], positions[row], new[s][row : row + 1])
            positions[row] += not skipped
        arrays, rings = tuple(s.pool.arrays for s in ours), tuple(s.exact.ring for s in ours)
        tables, clipped = tuple(s.pool.table(WIDTH + 1) for s in ours), tuple(s.clipped for s in ours)
        constants = tuple(c.constants(HEADS, CPU) for c in codecs)
        step(*(c.traits for c in codecs), *new, rings, arrays, tables, constants, state, page, most, clipped)
    assert max(f for row in frontiers for f in row) > 20
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.exact.ring, other.exact.ring) and mine.clipped == other.clipped
        for name, array in other.pool.arrays.items():
            assert torch.equal(mine.pool.arrays[name], array), name


def test_what_it_does_not_serve_is_named():
    plain = per_token(4)
    sparse = Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels"), outliers=Slots(slots=2))
    rotated = Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels"), transform=Unrotate(frequencies=(1.0,)))
    assert ask("STORE", plain, plain, device="cuda").name == "triton.step.step"
    assert "values keep outliers" in ask("STORE", plain, sparse, device="cuda").reasons[-1]
    assert "keys are stored before a rotary" in ask("STORE", rotated, plain, device="cuda").reasons[-1]


PROGRAM = """
from dataclasses import replace
import torch
from kvist.kernels.contract import Constants, Traits
from kvist.kernels.triton.ahead import compiled
from kvist.kernels.triton.codec import decode, decode_kernel, encode, encode_kernel, encode_pages, rotate, rotate_kernel
from kvist.kernels.triton.outliers import find_kernel
from kvist.kernels.triton.step import step, step_kernel

def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")

def numbers(t, dim):
    points = [empty(2**t.bits, dtype=torch.float32)] * 2 if t.levels == "table" else [None] * 2
    fixed = [empty(4, dim, dtype=torch.float32)] * 2 if t.range == "fixed" else [None] * 2
    return Constants(*points, *fixed, None, 1.0)

def pool(t, dim):
    codes = {"codes": empty(1, 4, 128, dim * t.bits // 8, dtype=torch.uint8)}
    codes = {"values": empty(1, 4, 128, dim)} if t.levels == "raw" else codes
    return codes | {"scale": empty(1), "offset": empty(1)} if t.range == "minmax" else codes

def there_and_back(t, x, slots):
    arrays = encode(t, x, numbers(t, x.shape[-1]), slots, turn=True)
    arrays.pop("clipped", None)
    decode(t, arrays, numbers(t, x.shape[-1]))

def written(dim, *sides):
    one, rings = empty(1, 4, 1, dim), (empty(1, 4, 160, dim),) * 2
    tables, state = (empty(1, 8, dtype=torch.int32),) * 2, empty(1, 6, dtype=torch.int32)
    pools, constants = tuple(pool(t, dim) for t in sides), tuple(numbers(t, dim) for t in sides)
    step(*sides, one, one, rings, pools, tables, constants, state, 128, (128, 128))

key, value = Traits("uniform", 2, "tokens", 128, False, "minmax"), Traits("uniform", 3, "channels", 32, False, "minmax")
turned = Traits("uniform", 4, "channels", 0, False, "minmax", hadamard=True)
fixed, across = Traits("table", 4, "channels", 0, False, "fixed"), Traits("table", 3, "channels", 0, True, "minmax")
raw = Traits("raw", 16, "channels", 0, False, "minmax")
for arch in (80, 90, 100):
    for t, dim, rank in (
        (key, 128, ""), (value, 96, ""), (turned, 80, ""), (fixed, 64, "largest"), (across, 128, "sides")
    ):
        t = replace(t, outliers=bool(rank), rank=rank)
        given = there_and_back, t, empty(1, 4, 4096, dim), 12 * t.outliers
        for kernel in (encode_kernel, decode_kernel, *[find_kernel] * t.outliers):
            (made,) = compiled(arch, kernel, *given)
            assert made.asm["cubin"] and made.metadata.shared <= 99 << 10, (arch, t)
    for dim, *sides in ((128, key, value), (128, turned, raw), (96, fixed, across)):
        assert compiled(arch, step_kernel, written, dim, *sides)[0].asm["cubin"]
    pages = key, empty(1, 4, 256, 128), pool(key, 128), empty(1, 8, dtype=torch.int32), empty(1, dtype=torch.int32)
    assert compiled(arch, encode_kernel, encode_pages, *pages, numbers(key, 128), 128)[0].asm["cubin"]
    assert compiled(arch, rotate_kernel, rotate, empty(1, 4, 256, 80), 16)[0].asm["cubin"]
def of_any_length():
    for tokens in (4096, 4128, 4096 + 16 * 41):
        there_and_back(value, empty(1, 4, tokens, 96), 0)

for kernel in (encode_kernel, decode_kernel):
    assert len(compiled(90, kernel, of_any_length)) == 1
print("compiled")
"""


def test_kernels_compile_for_gpus_that_are_not_here():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "compiled\n", done.stderr[-2000:]
