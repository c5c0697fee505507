"""Packed codes to numbers of half precision, two at a time: one helper with two bodies.

A code of b bits at bit k of a 16-bit half, everything else masked away, is the fp16 number code·2^(k-24): a subnormal,
exact, where k + b <= 10 (tensor cores take subnormals at full speed). So one AND turns two codes of a 32-bit word into
two operands, and nothing is converted; the powers of two go into what the numbers are multiplied with.

On a GPU the helper is inline PTX on 32-bit words. Triton's interpreter knows no PTX: there it is the same arithmetic on
16-bit lanes. `compare_all` holds one against the other on a GPU, on all 2^16 halves.
"""

import os

import torch
import triton
import triton.language as tl

PLAIN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def _ptx(bits: int) -> str:
    """PTX from $n, two halves, to n = 16 / bits registers: the fields of the low bytes, then those of the high ones."""
    fields = 8 // bits
    mask = (1 << bits) - 1
    masks = [(mask << (bits * f)) * 0x10001 for f in range(fields)]
    low = [f"and.b32 ${f}, ${2 * fields}, {m:#010x};" for f, m in enumerate(masks)]
    high = [f"and.b32 ${fields + f}, y, {m:#010x};" for f, m in enumerate(masks)]
    return f"{{ .reg .b32 y; shr.u32 y, ${2 * fields}, 8; {' '.join(low + high)} }}"


PTX = {bits: tl.constexpr(_ptx(bits)) for bits in (1, 2, 4, 8)}
PTX_1, PTX_2, PTX_4, PTX_8 = (PTX[bits] for bits in (1, 2, 4, 8))


@triton.jit
def _wired(x, BITS: tl.constexpr):
    if BITS == 1:
        return tl.inline_asm_elementwise(
            PTX_1, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r", [x], (tl.float16,) * 16, True, 2
        )
    elif BITS == 2:
        return tl.inline_asm_elementwise(PTX_2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [x], (tl.float16,) * 8, True, 2)
    elif BITS == 4:
        return tl.inline_asm_elementwise(PTX_4, "=r,=r,=r,=r,r", [x], (tl.float16,) * 4, True, 2)
    else:
        return tl.inline_asm_elementwise(PTX_8, "=r,=r,r", [x], (tl.float16,) * 2, True, 2)


@triton.jit
def _plain(x, BITS: tl.constexpr):
    numbers = ()
    for byte in tl.static_range(2):
        part = x >> (8 * byte)
        for field in tl.static_range(8 // BITS):
            code = part & (((1 << BITS) - 1) << (BITS * field))
            numbers = numbers + (code.to(tl.int16).to(tl.float16, bitcast=True),)
    return numbers


@triton.jit
def halves(x, BITS: tl.constexpr):
    """int16 lanes, two neighbouring bytes each, to 16 / BITS tensors of fp16: number i is field i mod (8 / BITS) of
    byte i // (8 / BITS), times 2^(BITS·field - 24)."""
    return _plain(x, BITS) if PLAIN else _wired(x, BITS)


@triton.jit
def _compare(x, out, BITS: tl.constexpr, WIRED: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    lanes = tl.load(x + at)
    numbers = _wired(lanes, BITS) if WIRED else _plain(lanes, BITS)
    for i in tl.static_range(16 // BITS):
        tl.store(out + i * 65536 + at, numbers[i])


def compare_all() -> None:
    """Both bodies on every half there is, at every width, bit for bit. Needs a GPU; raises RuntimeError on the first
    difference."""
    lanes = torch.arange(65536, dtype=torch.int32).sub(32768).to(torch.int16).cuda()
    for bits in (1, 2, 4, 8):
        outs = [torch.empty(16 // bits, 65536, dtype=torch.float16, device="cuda") for _ in range(2)]
        for out, wired in zip(outs, (True, False), strict=True):
            _compare[(64,)](lanes, out, BITS=bits, WIRED=wired)
        if not torch.equal(*(x.view(torch.int16) for x in outs)):
            raise RuntimeError(f"inline PTX and plain bit operations unpack {bits} bits differently on this GPU")
