"""The writing part of a decode step in one launch: the new token goes into the rings and, where a row is due, tokens
of its rings go into the packed pages.

What is due stands in a tensor on the device, so that a captured graph can be replayed. Tokens that are packed were put
into the rings by earlier launches; the new one goes into a slot that holds none of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.contract import Constants, Traits
from kvist.kernels.guard import on_its_device
from kvist.kernels.triton.coding import EXACT, warps
from kvist.kernels.triton.pack import code_tile
from kvist.kernels.triton.side import coding, constant, side, tokens_at

STATE = tl.constexpr(6)  # numbers per row

Sides = tuple[dict[str, Tensor], dict[str, Tensor]]


@triton.jit
def _append(new, ring, line, slot, capacity, dim: tl.constexpr):
    d = tl.arange(0, triton.next_power_of_2(dim))
    x = tl.load(new + line * dim + d, mask=d < dim)
    tl.store(ring + (line * capacity + slot) * dim + d, x, mask=d < dim)


@triton.jit
def _pack(S, ring, capacity, width, due, row, head, job):
    """Tile number `job` of the tokens that `due` names: their first position, and how many they are."""
    F: tl.constexpr = S.form
    start, count = tl.load(due), tl.load(due + 1)
    done = job // F.pieces * F.step
    if (done < count) & (head < (1 if F.across else F.heads)):
        t = tl.arange(0, F.tile)
        real = (t < F.step) & (done + t < count)
        position = start + done + t
        at = tokens_at(S, row.to(tl.int64), width, position, real, head)
        first = (row.to(tl.int64) * F.heads * capacity + position % capacity) * F.dim
        code_tile(S, ring, first, tl.cast(capacity, tl.int64) * F.dim, at, job % F.pieces * F.part)


@triton.jit(do_not_specialize=["capacity", "k_width", "v_width"])
def step_kernel(K, V, new, rings, state, capacity, k_width, v_width, K_JOBS: tl.constexpr):
    """Programs (jobs, heads, rows): the first jobs pack keys, the next values, and the last one appends the token."""
    job, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    due = state + row * STATE
    if job < K_JOBS:
        _pack(K, rings[0], capacity, k_width, due + 1, row, head, job)
    elif job < tl.num_programs(0) - 1:
        _pack(V, rings[1], capacity, v_width, due + 3, row, head, job - K_JOBS)
    else:
        position = tl.load(due)
        if position >= 0:
            line = (row * K.form.heads + head).to(tl.int64)
            _append(new[0], rings[0], line, position % capacity, capacity, K.form.dim)
            _append(new[1], rings[1], line, position % capacity, capacity, V.form.dim)


@on_its_device
def step(
    key: Traits, value: Traits, new_k: Tensor, new_v: Tensor, rings: tuple[Tensor, Tensor], pools: Sides,
    tables: tuple[Tensor, Tensor], constants: tuple[Constants, Constants], state: Tensor, page: int,
    most: tuple[int, int], clipped: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write one token of one layer, and pack what is due. Nothing is asked of the device.

    new_k and new_v (B, H, 1, D); rings (B, H, C, D), position p behind the sinks in slot p mod C; pools and page tables
    (B, width) int32 as `cache.pages` has them, position p in page slot p. state (B, 6) int32: position of the new token
    behind the sinks, -1 to write none; first position and number of the keys to pack; the same of values; unused.
    Numbers are whole groups, 0 packs nothing. most: as many tokens of each side may be due. clipped: int64, entries
    beyond fixed ranges are added to it.
    """
    batch, heads, capacity, _ = rings[0].shape
    if not all(x.is_contiguous() for x in (*rings, *tables, state)) or state.shape != (batch, 6) or not capacity:
        raise ValueError(
            f"rings with room, page tables and a state of shape ({batch}, 6) must be contiguous, found rings of "
            f"{capacity} tokens and a state of shape {tuple(state.shape)}"
        )
    if clipped is None:
        clipped = (torch.empty((), dtype=torch.int64, device=state.device),) * 2  # added to, and never read
    given = zip((key, value), rings, most, strict=True)
    forms = [coding(traits, ring.shape[3], heads, tokens, turn=True) for traits, ring, tokens in given]
    given = zip(forms, pools, constants, clipped, tables, strict=True)
    sides = [side(*x, constant(page), torch.int32, clipped=count, table=table) for *x, count, table in given]
    jobs = [-(-tokens // form.step) * form.pieces for form, tokens in zip(forms, most, strict=True)]
    step_kernel[(sum(jobs) + 1, heads, batch)](
        *sides, (new_k.contiguous(), new_v.contiguous()), tuple(rings), state, capacity,
        tables[0].shape[1], tables[1].shape[1], K_JOBS=jobs[0], num_warps=max(map(warps, forms)), **EXACT,
    )  # fmt: skip
