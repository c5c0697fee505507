"""Machine code, counted without a GPU: the instructions of a kernel's main loop."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);")
TARGET = re.compile(r"BRA.*?(\.L_x_\d+)")


class Loop(NamedTuple):
    """The main loop of a kernel. instructions: all of them; rare: those that a vote of the warp jumps over in almost
    all rounds; opcodes: how often each occurs."""

    instructions: int
    rare: int
    opcodes: Counter

    @property
    def usual(self) -> int:
        return self.instructions - self.rare


def disassemble(cubin: bytes) -> str:
    """What nvdisasm, of Triton's wheel, says. Raises ValueError without it."""
    try:
        import triton
    except ImportError:
        raise ValueError("counting instructions needs nvdisasm of Triton's wheel: pip install kvist[gpu]") from None
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def main_loop(sass: str, function: str) -> Loop:
    """The shortest loop that holds most of the matrix products of `function`. Raises ValueError where there is none."""
    code, labels = _code(sass, function)
    loops = [
        (labels[m[1]], i) for i, line in enumerate(code) if (m := TARGET.search(line)) and labels.get(m[1], i + 1) < i
    ]
    products = [sum("HMMA" in line for line in code[a : b + 1]) for a, b in loops]
    if not any(products):
        raise ValueError(f"{function} has no loop with matrix products")
    single = [n for n in products if n > 4]
    least = min(single) if single else max(products)
    a, b = min(((a, b) for (a, b), n in zip(loops, products, strict=True) if n >= least), key=lambda x: x[1] - x[0])
    body = code[a : b + 1]
    opcodes = Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in body)
    return Loop(len(body), _rare(code, labels, a, b), opcodes)


def _code(sass: str, function: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a function, and the numbers of those that labels stand before."""
    text = sass[sass.index(f".text.{function}") :]
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines()[1:]:
        if line.startswith("\t.section") and code:
            break
        if m := LABEL.match(line.strip()):
            labels[m[1]] = len(code)
        elif m := INSTRUCTION.match(line):
            code.append(m[1])
    return code, labels


def _rare(code: list[str], labels: dict[str, int], a: int, b: int) -> int:
    """Instructions of code[a:b] between a vote's forward jump and where it lands."""
    count = 0
    for i in range(a, b):
        if "VOTE" not in code[i]:
            continue
        for k in range(i + 1, min(i + 8, b)):
            m = TARGET.search(code[k])
            if m and k < labels[m[1]] <= b:
                count += labels[m[1]] - k - 1
                break
    return count
