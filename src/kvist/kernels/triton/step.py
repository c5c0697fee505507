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
from kvist.kernels.triton.coding import EXACT, Coding, coding, compiled, kinds, parts, pointers, warps
from kvist.kernels.triton.pack import code_tile

STATE = tl.constexpr(6)  # numbers per row

Sides = tuple[dict[str, Tensor], dict[str, Tensor]]


@triton.jit
def _append(new, ring, line, slot, capacity, dim: tl.constexpr):
    d = tl.arange(0, triton.next_power_of_2(dim))
    x = tl.load(new + line * dim + d, mask=d < dim)
    tl.store(ring + (line * capacity + slot) * dim + d, x, mask=d < dim)


@triton.jit
def _pack(P, ring, table, due, row, head, job, width, capacity, page, C: tl.constexpr):
    """Tile number `job` of the tokens that `due` names: their first position, and how many they are."""
    pieces: tl.constexpr = (C.dim // 8 + C.part - 1) // C.part
    step: tl.constexpr = C.group if C.along_tokens else C.tile
    start, count = tl.load(due), tl.load(due + 1)
    done = job // pieces * step
    if (done < count) & (head < (1 if C.across else C.heads)):
        t = tl.arange(0, C.tile)
        real = (t < step) & (done + t < count)
        position = start + done + t
        at = (row.to(tl.int64) * C.heads * capacity + position % capacity) * C.dim
        held = tl.load(table + row.to(tl.int64) * width + position // page, mask=real, other=0).to(tl.int64)
        stride = tl.cast(capacity, tl.int64) * C.dim
        code_tile(P, ring, at, stride, real, held, position % page, page, head, job % pieces * C.part, C)


@triton.jit
def step_kernel(
    K, V, new, rings, tables, state, k_width, v_width, capacity, page,
    KC: tl.constexpr, VC: tl.constexpr, K_JOBS: tl.constexpr,
):  # fmt: skip
    """Programs (jobs, heads, rows): the first jobs pack keys, the next values, and the last one appends the token."""
    job, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    due = state + row * STATE
    if job < K_JOBS:
        _pack(K, rings[0], tables[0], due + 1, row, head, job, k_width, capacity, page, KC)
    elif job < tl.num_programs(0) - 1:
        _pack(V, rings[1], tables[1], due + 3, row, head, job - K_JOBS, v_width, capacity, page, VC)
    else:
        position = tl.load(due)
        if position >= 0:
            line = (row * KC.heads + head).to(tl.int64)
            _append(new[0], rings[0], line, position % capacity, capacity, KC.dim)
            _append(new[1], rings[1], line, position % capacity, capacity, VC.dim)


def _uncounted(device: torch.device) -> tuple[Tensor, Tensor]:
    count = torch.empty((), dtype=torch.int64, device=device)  # added to, and never read
    return count, count


def _jobs(c: Coding, most: int) -> int:
    return -(-most // (c.group if c.along_tokens else c.tile)) * parts(c)


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
    (batch, heads, capacity, dim), value_dim = rings[0].shape, rings[1].shape[3]
    if not all(x.is_contiguous() for x in (*rings, *tables, state)) or state.shape != (batch, 6) or not capacity:
        raise ValueError(
            f"rings with room, page tables and a state of shape ({batch}, 6) must be contiguous, found rings of "
            f"{capacity} tokens and a state of shape {tuple(state.shape)}"
        )
    k, v = coding(key, dim, heads, most[0], turn=True), coding(value, value_dim, heads, most[1], turn=True)
    counted = clipped or _uncounted(state.device)
    jobs = _jobs(k, most[0]), _jobs(v, most[1])
    step_kernel[(sum(jobs) + 1, heads, batch)](
        pointers(pools[0], constants[0], None, counted[0]), pointers(pools[1], constants[1], None, counted[1]),
        (new_k.contiguous(), new_v.contiguous()), tuple(rings), tuple(tables), state,
        tables[0].shape[1], tables[1].shape[1], capacity, page,
        KC=k, VC=v, K_JOBS=jobs[0], num_warps=max(warps(k), warps(v)), **EXACT,
    )  # fmt: skip


def compile_step(arch: int, key: Coding, value: Coding, dtype: str = "fp16"):
    """The kernel for `sm_arch`, without a GPU. dtype: of exact tokens, in Triton's words."""
    pair = (f"*{dtype}",) * 2
    types = {"K": kinds(key.low > 0, dtype), "V": kinds(value.low > 0, dtype), "new": pair, "rings": pair}
    types |= {"tables": ("*i32",) * 2, "state": "*i32"}
    fixed = {"KC": key, "VC": value, "K_JOBS": 1}
    return compiled(step_kernel, arch, types, fixed, max(warps(key), warps(value)), ("page",))
