"""The host's side of Triton decode attention: what a launch is given, and how it is shaped.

See `attend` for the kernel, and STEP in `choose` for what it takes.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvist.kernels.contract import PLANES, Decode, Exact, Stored, Traits
from kvist.kernels.guard import on_its_device
from kvist.kernels.triton.attend import decode_kernel
from kvist.kernels.triton.tiles import Arrays, Form

COLUMNS = 16  # query rows per program at most
LOOSE = 32  # loose tokens per program
WAVES = 8  # programs per multiprocessor that a launch aims for


class Configuration(NamedTuple):
    """How a launch is compiled. tile: tokens multiplied at a time. Of 64 and more, Triton 3.6 makes `wgmma`, and some
    of these it gets wrong."""

    tile: int
    warps: int
    stages: int


FOLDED, DENSE = Configuration(32, 1, 2), Configuration(32, 4, 2)  # one warp needs no barriers; decoding wants registers


def configurations() -> list[Configuration]:
    """All that may be chosen: each must be right before it may be fast."""
    return [FOLDED, DENSE]


@cache
def form(traits: Traits, dim: int, heads: int, page: int, slots: int, pairs: int, scaling: float = 1.0) -> Form:
    """One side as the kernel is compiled for it."""
    raw, table, stored = traits.levels == "raw", traits.levels == "table", traits.range != "fixed"
    low, high = (0, 0) if raw else (*PLANES[traits.bits], 0)[:2]
    along = traits.along == "tokens"
    padded, size, group = triton.next_power_of_2(dim), dim * low // 8, traits.group or dim
    block = min(group, size) if stored and not along else size
    aligned = not along or group % FOLDED.tile == 0  # a tile lies within one group of tokens
    whole = aligned and (along or not stored or group % max(1, block) == 0)
    even = padded == dim and low and not high and block >= 32 and size % block == 0
    plain = traits.levels == "uniform" and not traits.outliers and not traits.rotary
    return Form(
        low=low, high=high, dim=dim, padded=padded, heads=heads, page=page, group=group if stored else page,
        along_tokens=along, across=traits.across_heads, stored=stored, offset=traits.range != "absmax",
        shift=0.0 if table or raw else (1 - 2**traits.bits) / 2, table=table,
        slots=slots if traits.outliers else 0, pairs=pairs if traits.rotary else 0, scaling=scaling,
        interleaved=traits.rotary == "interleaved", hadamard=dim & -dim if traits.hadamard else 0, block=block,
        folded=bool(even and whole and plain),
    )  # fmt: skip


def _arrays(stored: Stored, q: Tensor) -> Arrays:
    """Pointers; what is not there points at the queries and is never read."""
    arrays, c = stored.arrays, stored.constants
    codes = arrays["codes"] if "codes" in arrays else arrays["values"]
    lanes = codes.view(torch.int16) if codes.dtype == torch.uint8 and codes.shape[-1] % 2 == 0 else codes
    named = (arrays.get(name, q) for name in ("scale", "offset"))
    sparse = (arrays.get(name, q) for name in ("outlier", "channel", "ends"))
    numbers = (q if x is None else x for x in (c.points, c.scale, c.offset))
    frequencies = q if c.frequencies is None else c.frequencies
    return Arrays(codes, lanes, *named, *numbers, *sparse, frequencies, stored.table)


def splits_for(cells: int, pages: int, device: torch.device) -> int:
    """Programs that share a row's pages; the lengths are on the device and are not asked."""
    if device.type != "cuda":
        return max(1, min(3, pages))
    many = WAVES * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(pages, -(-many // cells)))


@on_its_device
def decode(
    key: Traits, value: Traits, q: Tensor, k: Stored, v: Stored, k_exact: Exact, v_exact: Exact, call: Decode,
    configuration: Configuration | None = None, splits: int = 0,
) -> Tensor:  # fmt: skip
    """See `choose`: STEP. splits: 0 lets the device's size decide."""
    batch, q_heads, queries, dim = q.shape
    heads, value_dim = k_exact.ring.shape[1], v_exact.ring.shape[-1]
    page = call.page
    key_form = form(key, dim, heads, page, *_sizes(k))
    value_form = form(value, value_dim, heads, page, *_sizes(v))
    if not value_form.stored or value_form.along_tokens:
        value_form = value_form._replace(folded=False)
    rows = q_heads // heads * queries
    m = min(COLUMNS, max(8, triton.next_power_of_2(rows)))
    blocks = -(-rows // m)
    pins = 0 if call.pinned is None else call.pinned.shape[1]
    sinks, capacity = k_exact.sinks.shape[2], k_exact.ring.shape[2]
    width = min(k.table.shape[1], v.table.shape[1])
    splits = splits or splits_for(batch * heads * blocks, max(1, width), q.device)
    loose = -(-(sinks + capacity + pins) // LOOSE)
    parts = splits + loose
    scratch = torch.empty(batch * heads * blocks * parts * m * (value_dim + 2), dtype=torch.float32, device=q.device)
    cells = batch * heads * blocks * parts * m
    out = torch.empty(batch, q_heads, queries, value_dim, dtype=q.dtype, device=q.device)
    config = configuration or (FOLDED if key_form.folded and value_form.folded else DENSE)
    pairs = max(1, key_form.pairs)
    rest = max(1, dim - 2 * key_form.pairs)
    none = out
    decode_kernel[parts, batch * heads, blocks](
        q.contiguous(), out, scratch[2 * cells :], scratch[:cells], scratch[cells : 2 * cells], call.counters,
        _arrays(k, q), _arrays(v, q),
        tuple(x if x.numel() else none for x in k_exact), tuple(x if x.numel() else none for x in v_exact),
        call.state, call.state if call.skip is None else call.skip.view(torch.uint8),
        call.state if call.pinned is None else call.pinned, none if call.sink is None else call.sink.float(),
        call.scale, k.table.shape[1], v.table.shape[1], 0 if call.skip is None else call.skip.shape[1],
        sinks, capacity, k_exact.pinned.shape[2], v_exact.pinned.shape[2], pins, loose, parts,
        KF=key_form, VF=value_form, HEADS=heads, QUERIES=queries, ROWS=rows, M=m, T=min(config.tile, page), LT=LOOSE,
        P2=max(16, triton.next_power_of_2(pairs)), REST=max(16, triton.next_power_of_2(rest)),
        SOFTCAP=float(call.softcap or 0.0), SKIPS=call.skip is not None, SINK=call.sink is not None,
        MR=m if value_form.hadamard else min(m, triton.next_power_of_2(rows)),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def compiled(arch: int, key: Form, value: Form, dtype: str = "fp16", m: int = 8, config: Configuration | None = None):
    """The kernel for `sm_arch`, without a GPU: what Triton's `compile` returns. dtype: of the queries and exact tokens,
    in Triton's words."""
    config = config or (FOLDED if key.folded and value.folded else DENSE)
    side = Arrays("*u8", "*i16", *("*fp16",) * 2, *("*fp32",) * 3, "*fp16", "*u8", "*u8", "*fp32", "*i32")
    exact = (f"*{dtype}",) * 3
    types = {
        "q": f"*{dtype}", "out": f"*{dtype}", "part_out": "*fp32", "part_top": "*fp32", "part_total": "*fp32",
        "counters": "*i32", "K": side, "V": side, "EK": exact, "EV": exact, "state": "*i32", "skip": "*u8",
        "pinned": "*i32", "logits": "*fp32", "scale": "fp32",
    }  # fmt: skip
    fixed = {
        "KF": key, "VF": value, "HEADS": key.heads, "QUERIES": 1, "ROWS": m, "M": m, "T": config.tile, "LT": LOOSE,
        "P2": max(16, triton.next_power_of_2(max(1, key.pairs))), "REST": max(16, key.padded - 2 * key.pairs),
        "SOFTCAP": 0.0, "SKIPS": False, "SINK": False, "MR": m,
    }  # fmt: skip
    names = decode_kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in fixed else "i32") for name in names}
    pointers = {name for name, kind in types.items() if isinstance(kind, str) and kind.startswith("*")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers}
    for i, name in enumerate(names):
        if isinstance(types.get(name), tuple):
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(len(types[name]))}
    source = ASTSource(
        decode_kernel, signature, constexprs={(names.index(name),): x for name, x in fixed.items()}, attrs=aligned
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _sizes(side: Stored) -> tuple[int, int, float]:
    """Slots of outliers per token; rotated pairs of channels, and the scaling of their rotation."""
    frequencies = side.constants.frequencies
    slots = side.arrays["channel"].shape[-1] if "channel" in side.arrays else 0
    return slots, 0 if frequencies is None else len(frequencies), float(side.constants.scaling)
