"""Files that anybody may have made: plain files alone, read to a bound, JSON to a depth, archives to a size.

Every function raises ValueError with a reason that reads on after a colon ("it is a folder"); who asked says what was
expected and what to try. Nothing is read of a pipe or a device, which may never end.
"""

import json
import lzma
import os
import re
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError

MOST_BYTES = 1 << 26  # of JSON: a recipe fitted to 80 layers of 8,192 channels has 40 MiB
MOST_ITEMS, MOST_LISTS = 1 << 22, 1 << 20  # what takes 2 bytes of text takes up to 70 in memory
MOST_DEPTH = 64
MOST_DICTIONARY = 1 << 28  # bytes that an xz file may ask of its reader; the highest preset asks for 65 MiB
MOST_STREAMS = 64
CHUNK = 1 << 20
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def plain(path: str | Path, most: int | None = None) -> int:
    """The size of a plain file, which has at most `most` bytes."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise ValueError(_reason(error)) from None
    return _sized(found, most)


def read(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a plain file, at most `most`."""
    plain(path, most)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            _sized(os.fstat(file.fileno()), most)  # what was opened: it may have been exchanged
            data = file.read(most + 1)
    except OSError as error:
        raise ValueError(_reason(error)) from None
    if len(data) > most:  # files of the system have no size beforehand
        raise ValueError(f"it has more than {most} bytes")
    return data


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """A plain file's text in UTF-8."""
    return _decoded(read(path, most))


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds; see `parse`."""
    return parse(read(path, most))


def parse(data: bytes | str) -> Any:
    """What JSON holds: at most MOST_DEPTH deep, MOST_ITEMS long, its numbers no NaN, its text valid."""
    text = _decoded(data) if isinstance(data, bytes) else data
    brackets = text.count("[") + text.count("{")
    if brackets > MOST_LISTS or text.count(",") > MOST_ITEMS:
        raise ValueError(f"it has more than {MOST_LISTS} lists or {MOST_ITEMS} entries")
    if brackets > MOST_DEPTH and _depth(text) > MOST_DEPTH:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH}")
    try:
        found = json.loads(text, parse_constant=_refused)
        if SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has text that is no Unicode") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg}, line {error.lineno} column {error.colno}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits
        raise ValueError("it is not JSON") from None
    return found


def unpack(data: bytes, most: int) -> bytes:
    """What an xz file holds, at most `most` bytes, however little it takes packed."""
    parts, size, streams = [], 0, 0
    while data:
        streams += 1
        if streams > MOST_STREAMS:
            raise ValueError(f"it is {MOST_STREAMS} xz files or more, one behind the other")
        machine = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_DICTIONARY)
        while not machine.eof:
            try:
                part = machine.decompress(data, CHUNK)
            except (lzma.LZMAError, EOFError, MemoryError):
                raise ValueError("it is no xz file, or damaged") from None
            size += len(part)
            if size > most:
                raise ValueError(f"it holds more than {most} bytes")
            if not part and machine.needs_input:
                raise ValueError("it is no xz file, or damaged")
            parts.append(part)
            data = b""
        data = machine.unused_data.lstrip(b"\0")  # streams may follow each other, with padding between them
    return b"".join(parts)


def said(error: ValidationError) -> str:
    """Where the first fault of a description is, and which."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    words = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        words = f"expected named fields, found {first['input']!r}"
    return (f"{where}: " if where else "") + printable(words)


def printable(words: str, most: int = 1000) -> str:
    """Words on one line, safe for a terminal: what does not print is spelled out, and what is too long is cut."""
    line = " ".join(words.split())
    line = line if len(line) <= most else line[: most - 2] + " …"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class _Refused(ValueError):
    pass


def _refused(word: str) -> None:
    raise _Refused(f"it has the number {word}")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in STRUCTURE.finditer(text):
        if found[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif found[0] in "]}":
            depth -= 1
    return deepest


def _sized(found: os.stat_result, most: int | None) -> int:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file")
    if most is not None and found.st_size > most:
        raise ValueError(f"it has {found.st_size} bytes, expected at most {most}")
    return found.st_size


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
