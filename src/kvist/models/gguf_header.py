"""The header of a GGUF file, read within bounds: what a stranger's file claims is checked against what it holds.

The library that reads these files trusts their counts and sizes; a damaged or hostile one would fill the memory. Here
every number is looked at once, before it is trusted. Layout: the GGUF specification, versions 2 and 3, little endian.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_ENTRIES, MOST_ITEMS, MOST_BYTES, MOST_DIMS = 1 << 16, 1 << 22, 1 << 24, 4
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by type of value
STRING, ARRAY, U16, U32, BF16 = 8, 9, 2, 4, 30
TOLD = ("general.architecture", "general.alignment", "split.count")  # values that are kept, where they are small


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its architecture, how many tensors, of how many numbers in all, and whether any of
    them is stored as bfloat16."""

    architecture: str
    tensors: int
    elements: int
    bfloat16: bool


def read_header(path: Path) -> Header:
    """Check a file and read its header. Raises ValueError with one sentence, without the file's name."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = {int(kind): GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
    with path.open("rb") as file:
        reader = _Reader(file)
        if reader.take(4) != MAGIC:
            raise ValueError("it is not a GGUF file: it does not begin with GGUF")
        version = reader.number(U32)
        if version not in VERSIONS:
            raise ValueError(f"it is GGUF of version {version}, versions 2 and 3 (little endian) are read")
        tensors, entries = (reader.bounded(reader.number(10), MOST_ENTRIES, "entries") for _ in range(2))
        told = dict(reader.entry() for _ in range(entries))
        if told.get("split.count", 0) > 1:
            raise ValueError("it is one part of a model that was split; join the parts by llama-gguf-split --merge")
        found = [reader.tensor(sizes) for _ in range(tensors)]
        _within(found, reader, told.get("general.alignment", 32))
    architecture = told.get("general.architecture")
    if not isinstance(architecture, str) or not found:
        raise ValueError("it holds no model: no architecture is named, or there are no tensors")
    return Header(architecture, tensors, sum(t[0] for t in found), any(t[3] == BF16 for t in found))


def _within(found: list[tuple[int, int, int, int]], reader: "_Reader", alignment) -> None:
    """Every tensor (elements, bytes, offset, type) lies inside the file."""
    if not isinstance(alignment, int) or not 0 < alignment <= MOST_ENTRIES or alignment & (alignment - 1):
        raise ValueError(f"its tensors are aligned to {alignment!r} bytes, which is no power of two")
    start = -(-reader.at // alignment) * alignment
    end = max((start + offset + nbytes for _, nbytes, offset, _ in found), default=0)
    if end > reader.length:
        raise ValueError(f"it is cut short: its tensors end at byte {end}, the file at {reader.length}; fetch it again")


class _Reader:
    """Values one after the other; never more than the file has."""

    def __init__(self, file: BinaryIO):
        self.file, self.at, self.length = file, 0, os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        if count > self.length - self.at:
            raise ValueError(f"it is cut short, or no GGUF file: it ends at byte {self.length}, inside its header")
        self.at += count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.length - self.at:
            self.take(count)
        self.at += count
        self.file.seek(self.at)

    def number(self, kind: int) -> int:
        """An unsigned integer of a type of value."""
        return struct.unpack({U16: "<H", U32: "<I"}.get(kind, "<Q"), self.take(SIZES[kind]))[0]

    def bounded(self, count: int, most: int, what: str) -> int:
        if count > most:
            raise ValueError(f"it claims {count} {what}, more than {most} are not believed")
        return count

    def string(self) -> bytes:
        return self.take(self.bounded(self.number(10), MOST_BYTES, "bytes of text"))

    def entry(self) -> tuple[str, str | int | None]:
        """A key of the metadata, and its value where that is wanted."""
        key, kind = self.string().decode(errors="replace"), self.number(U32)
        if key not in TOLD or kind == ARRAY:
            self.value(kind)
            return key, None
        if kind == STRING:
            return key, self.string().decode(errors="replace")
        if kind not in SIZES:
            raise ValueError(f"its entry {key!r} has the type {kind}, which GGUF does not know")
        return key, int.from_bytes(self.take(SIZES[kind]), "little")

    def value(self, kind: int) -> None:
        """Pass over a value."""
        if kind == STRING:
            self.skip(self.bounded(self.number(10), MOST_BYTES, "bytes of text"))
        elif kind == ARRAY:
            inner, count = self.number(U32), self.bounded(self.number(10), MOST_ITEMS, "items of one list")
            if inner == STRING:
                for _ in range(count):
                    self.value(STRING)
            elif inner in SIZES:
                self.skip(SIZES[inner] * count)
            else:
                raise ValueError(f"a list of it has items of type {inner}, which are not read")
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"a value of it has the type {kind}, which GGUF does not know")

    def tensor(self, sizes: dict[int, tuple[int, int]]) -> tuple[int, int, int, int]:
        """Elements, bytes, offset and type of a tensor."""
        name = self.string().decode(errors="replace")
        dims = [self.number(10) for _ in range(self.bounded(self.number(U32), MOST_DIMS, "dimensions"))]
        kind, offset = self.number(U32), self.number(10)
        if kind not in sizes:
            raise ValueError(f"its tensor {name} is stored as type {kind}, which the package gguf does not know")
        elements = 1
        for dim in dims:
            elements *= dim
        block, nbytes = sizes[kind]
        if not dims or not elements or dims[0] % block:
            raise ValueError(f"its tensor {name} of shape {dims} has no numbers, or rows that are not whole blocks")
        return elements, elements // block * nbytes, offset, kind
