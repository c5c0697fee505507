"""Files changed by a seeded hand: their bytes, or what stands in them, with a checksum that fits again."""

import copy
import json
import lzma
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EVIL: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 7, 31, 33, 64, 128, 255, 256, 4992, 65504, 2**31 - 1, 2**31, 2**63, 10**12),
    *(10**15, 10**30, -(10**15), 0.5, -0.5, 1e-300, 65505.0, 1e15, 1e308, float("nan"), float("inf"), 1e999),
    *("", "x", "load", "float64", "int8", "../../x", "\ud800", "\x1b[2J", "a" * 5000, "table", "slots", "unrotate"),
    *([], {}, [[]], {"a": 1}, [0] * 1000, [None], ["a"], [[0, 0]]),
]
DEEP = "[" * 100_000 + "]" * 100_000


def places(tree: Any, limit: int = 4000) -> list[tuple[Any, Any]]:
    """(container, key) of every node of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    open_ = [tree]
    while open_ and len(found) < limit:
        node = open_.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        open_ += [node[key] for key in keys]
    return found


def tree(found: Any, draw: random.Random) -> Any:
    """A JSON tree with one to three nodes changed."""
    found = copy.deepcopy(found)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        known = places(found)
        if not known:
            return draw.choice(EVIL)
        numbers = [(node, key) for node, key in known if type(node[key]) in (int, float)]
        node, key = draw.choice(numbers if numbers and draw.random() < 0.5 else known)
        value, how = node[key], draw.randrange(8)
        if type(value) in (int, float) and how < 5:
            node[key] = draw.choice((value + 1, value - 1, value * 2, value + 32, value + 64, -value, value * 1000, 0))
        elif how == 4:
            del node[key]
        elif how == 5:
            other, place = draw.choice(known)
            node[key] = copy.deepcopy(other[place])
        elif how == 6 and isinstance(node, list):
            node.insert(key, copy.deepcopy(value))
        elif how == 6 and isinstance(node, dict):
            node[draw.choice(("surprise", key + "s"))] = value
        else:
            node[key] = copy.deepcopy(draw.choice(EVIL))
    return found


def text(found: Any, draw: random.Random) -> bytes:
    """JSON of a changed tree; now and then far too deep, or changed as bytes."""
    made = json.dumps(tree(found, draw))
    if draw.random() < 0.02:
        made = made.replace("1", DEEP, 1)
    data = made.encode()
    return octets(data, draw) if draw.random() < 0.15 else data


def octets(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, set, cut out, cut off, put in or repeated."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(made) or 1)
        how = draw.choice(("flip", "set", "cut", "end", "insert", "copy"))
        if how in ("flip", "set") and made:
            made[at] = made[at] ^ 1 << draw.randrange(8) if how == "flip" else draw.randrange(256)
        elif how == "cut":
            del made[at : at + draw.randint(1, 40)]
        elif how == "end":
            del made[at:]
        elif how == "insert":
            made[at:at] = draw.randbytes(draw.randint(1, 12))
        else:
            made[at:at] = made[: draw.randint(1, 60)]
    return bytes(made)


def tensors(found: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """One or two tensors of a file with other numbers, another shape or type, another name, or none."""
    found = dict(found)
    for _ in range(draw.choice((1, 1, 2))):
        if not found:
            break
        name = draw.choice(sorted(found))
        old = found[name]
        how = draw.randrange(8)
        if how < 3:
            noise = torch.frombuffer(bytearray(draw.randbytes(max(1, old.nbytes))), dtype=torch.uint8)
            found[name] = noise[: old.nbytes].clone().view(old.dtype).reshape(old.shape) if old.nbytes else old
        elif how == 3:
            extreme = draw.choice((0, 255, 127, -1) if not old.is_floating_point() else (1e4, float("nan"), torch.inf))
            found[name] = torch.full_like(old, extreme if old.dtype != torch.uint8 else abs(extreme))
        elif how == 4:
            shapes = old.flatten(), old.flatten()[:0], old.unsqueeze(0), old[:1] if old.dim() else old
            found[name] = draw.choice(shapes).clone()
        elif how == 5:
            kinds = (torch.float64, torch.uint8, torch.int64, torch.bool)
            found[name] = old.nan_to_num().to(draw.choice(kinds)) if old.is_floating_point() else old.double()
        elif how == 6:
            found[draw.choice((name + "x", "9." + name, draw.choice(sorted(found))))] = found.pop(name)
        else:
            found.pop(name)
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def lines(data: bytes, draw: random.Random) -> bytes:
    """Rows of results, some of them changed."""
    rows = [json.loads(line) for line in data.splitlines()]
    at = draw.randrange(len(rows))
    rows[at] = tree(rows[at], draw)
    made = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return octets(made, draw) if draw.random() < 0.15 else made


def packed(data: bytes, draw: random.Random, change: Callable[[bytes, random.Random], bytes]) -> bytes:
    """An xz file of changed bytes, or one that is changed itself."""
    if draw.random() < 0.5:
        return lzma.compress(change(data, draw), preset=0)
    return octets(lzma.compress(data, preset=0), draw)
