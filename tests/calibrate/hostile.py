"""Files that would harm, break or bloat a reader of pickles, and the words that refuse them."""

import os
import pickle
import struct

import numpy as np
import torch
from quantizers import CHANNELS, Reduced, array_of, broken, dump, entries, legacy, nested, persistent, tensor_of

from kvist.calibrate.pickled import MOST_STEPS


class Stated:
    def __init__(self):
        self.inside = 1


def touch(path) -> str:
    return f"touch {path}"


# what each file holds, given the path of a file that must not come to be
HOSTILE = {
    "os.system": lambda path: {"a": Reduced(os.system, touch(path))},
    "os.system alone": lambda path: Reduced(os.system, touch(path)),
    "eval": lambda path: {"a": Reduced(eval, f"open({str(path)!r}, 'w')")},
    "exec among items": lambda path: broken(_4=Reduced(exec, f"open({str(path)!r}, 'w')")),
    "open": lambda path: {"a": Reduced(open, str(path), "w")},
    "getattr": lambda path: {"a": Reduced(getattr, "torch", "load")},
    "torch.load": lambda path: {"a": Reduced(torch.load, str(path))},
    "nested os.system": lambda path: nested(pickle.dumps(Reduced(os.system, touch(path)), protocol=2)),
    "nested after magic": lambda path: nested(
        b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        + pickle.dumps(Reduced(os.system, touch(path)), protocol=2)
    ),
    "nested protocol 0": lambda path: nested(b"cposix\nsystem\n(S'" + touch(path).encode() + b"'\ntR."),
    "protocol 0": lambda path: b"cposix\nsystem\n(S'" + touch(path).encode() + b"'\ntR.",
    "INST": lambda path: b"(S'" + touch(path).encode() + b"'\niposix\nsystem\n.",
    "OBJ": lambda path: b"\x80\x05(cposix\nsystem\n\x8c\x01ao.",
    "OBJ of ours": lambda path: b"\x80\x05(\x8c\x0bcollections\x8c\x0bOrderedDict\x93o.",
    "NEWOBJ": lambda path: Stated(),
    "NEWOBJ of ours": lambda path: b"\x80\x05\x8c\x0bcollections\x8c\x0bOrderedDict\x93)\x81.",
    "slices": lambda path: {"a": slice(1)},
    "set": lambda path: {"a": {1}},
    "extension": lambda path: b"\x80\x02\x82\x01.",
    "big extension": lambda path: b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id": lambda path: persistent(),
    "persistent text": lambda path: b"\x80\x02Poutside\n.",
    "BUILD of a dict": lambda path: b"\x80\x05}}b.",
    "BUILD of a tensor": lambda path: dump({"a": torch.ones(2)})[:-2] + b"}bs.",
    "buffer": lambda path: b"\x80\x05\x97.",
    "dotted name": lambda path: b"\x80\x05\x8c\x05torch\x8c\x1d_utils._rebuild_tensor_v2.__g\x93.",
    "name of a list": lambda path: b"\x80\x05]]\x93.",
    "call of text": lambda path: b"\x80\x05\x8c\x01a)R.",
    "ordered dict of items": lambda path: b"\x80\x05\x8c\x0bcollections\x8c\x0bOrderedDict\x93]\x85R.",
    "deep key": lambda path: b"\x80\x05})" + b"\x85" * 100_000 + b"Ns.",
    "deep value": lambda path: b"\x80\x05}\x8c\x01a)" + b"\x85" * 100_000 + b"s.",
    "list in itself": lambda path: b"\x80\x05}\x8c\x01a]\x94h\x00as.",
    "long program": lambda path: b"\x80\x05" + b")" * MOST_STEPS + b".",
    "memo far away": lambda path: b"\x80\x05}r\xff\xff\xff\x7f.",
    "memo missing": lambda path: b"\x80\x05j\xff\xff\xff\x7f.",
    "huge bytes": lambda path: b"\x80\x05\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "huger bytes": lambda path: b"\x80\x05\x96" + struct.pack("<Q", (1 << 64) - 1) + b"x.",
    "huge text": lambda path: b"\x80\x05X\xff\xff\xff\xffx.",
    "huge frame": lambda path: b"\x80\x05\x95" + struct.pack("<Q", 1 << 62) + b"}.",
    "huge int": lambda path: b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.",
    "unknown protocol": lambda path: b"\x80\x7f}.",
    "mark at the end": lambda path: b"\x80\x05(.",
    "mark in the memo": lambda path: b"\x80\x05(\x94.",
    "two objects": lambda path: b"\x80\x05}}.",
    "a tail": lambda path: dump(entries()) + b"x",
    "odd items": lambda path: b"\x80\x05}(\x8c\x01au.",
    "bytes as key": lambda path: {b"a": 1},
    "broken text": lambda path: b"\x80\x05\x8c\x02\xff\xff.",
    "empty file": lambda path: b"",
    "text": lambda path: b"hello, world",
    "zip": lambda path: b"PK\x03\x04" + bytes(100),
    "nested zip": lambda path: nested(b"PK\x03\x04" + bytes(100)),
    "nested nothing": lambda path: nested(b""),
    "nested program": lambda path: nested(b"\x80\x02" + b")" * 1000 + b"."),
    "nested truncated": lambda path: nested(legacy()[:-1]),
    "nested tail": lambda path: nested(legacy() + b"x"),
    "nested more declared": lambda path: nested(legacy(a=(b"K\x04Nt", b"J\xff\xff\xff\x7fNt"))),
    "nested huge declared": lambda path: nested(
        legacy(a=(b"K\x04Nt", b"\x8a\x08" + struct.pack("<q", 1 << 60) + b"Nt"))
    ),
    "nested negative": lambda path: nested(legacy(a=(b"K\x04Nt", b"J\xff\xff\xff\xffNt"))),
    "big endian": lambda path: nested(legacy(a=(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))),
    "nested list": lambda path: broken(_0=Reduced(torch.storage._load_from_bytes, [1])),
    "integers": lambda path: broken(_0=torch.ones(1, CHANNELS, dtype=torch.int64)),
    "bfloat16": lambda path: broken(_0=torch.ones(1, CHANNELS, dtype=torch.bfloat16)),
    "complex": lambda path: broken(_0=torch.ones(1, CHANNELS, dtype=torch.complex64)),
    "offset": lambda path: tensor_of(5, (1, 4), (4, 1)),
    "negative offset": lambda path: tensor_of(-1, (1, 4), (4, 1)),
    "stride": lambda path: tensor_of(0, (1, 4), (4, 3)),
    "negative stride": lambda path: tensor_of(7, (4,), (-1,)),
    "stride of zero": lambda path: tensor_of(0, (1, 1 << 40), (0, 0)),
    "size": lambda path: tensor_of(0, (1 << 62, 4), (0, 0)),
    "size overflows": lambda path: tensor_of(0, (1 << 200,), (0,)),
    "empty tensor": lambda path: tensor_of(0, (0, 5), (1, 1 << 100)),
    "many axes": lambda path: tensor_of(0, (1,) * 70, (1,) * 70),
    "size of floats": lambda path: tensor_of(0, (1.0, 4.0), (4, 1)),
    "size of booleans": lambda path: tensor_of(False, (True,), (True,)),
    "size and strides": lambda path: tensor_of(0, (1, 4), (1,)),
    "no storage": lambda path: broken(_0=Reduced(torch._utils._rebuild_tensor_v2)),
    "tensor as storage": lambda path: broken(
        _0=Reduced(torch._utils._rebuild_tensor_v2, torch.ones(2, 2), 0, (1,), (1,), False, {})
    ),
    "object array": lambda path: broken(_2=[np.array([{}, []], dtype=object)]),
    "array of ints": lambda path: broken(_2=[np.arange(8)[:, None]]),
    "array of objects": lambda path: array_of(bytes(8), np.dtype("O"), (1,), "C"),
    "array of records": lambda path: array_of(bytes(8), np.dtype([("a", "f4"), ("b", "f4")]), (1,), "C"),
    "array too large": lambda path: array_of(bytes(8), np.dtype("f4"), (1 << 60, 4), "C"),
    "array too small": lambda path: array_of(bytes(8), np.dtype("f4"), (1,), "C"),
    "array order": lambda path: array_of(bytes(32), np.dtype("f4"), (8, 1), torch.ones(2)),
    "array of a tensor": lambda path: array_of(torch.ones(8), np.dtype("f4"), (8, 1), "C"),
    "array without type": lambda path: array_of(bytes(32), "f4", (8, 1), "C"),
    "array unpickled by numpy": lambda path: broken(_2=[np.ones((16, 2), np.float32)[::2, :1]]),
}

REASONS = {
    "expected keys such as": ("deep value", "list in itself"),
    "more than 1048576 opcodes": ("long program",),
    "more than 200 opcodes": ("nested program",),
    "no dict of layers": ("memo far away",),
    "not read yet": ("memo missing", "text"),
    "only 2 remain": ("huge bytes", "huge text"),
    "maxsize": ("huger bytes",),
    "more than there can be": ("huge frame", "unknown protocol"),
    "more from its stack": ("mark at the end", "mark in the memo"),
    "more than one object": ("two objects",),
    "goes on after its end": ("a tail",),
    "no list or dict": ("odd items",),
    "keys other than text": ("bytes as key", "deep key"),
    "codec": ("broken text",),
    "outside itself": ("persistent id",),
    "sets the state": ("BUILD of a dict", "BUILD of a tensor"),
    "other than text": ("name of a list",),
    "no constructor": ("call of text",),
    "an empty one": ("ordered dict of items",),
    "a zip file": ("nested zip",),
    "numbers and has": ("nested truncated", "nested tail", "nested more declared", "nested huge declared"),
    "storage of floats": ("nested negative",),
    "little-endian": ("big endian",),
    "tensor without bytes": ("nested list",),
    "reaches beyond its 8": ("offset", "stride", "stride of zero", "size", "size overflows", "empty tensor"),
    "of no shape": (
        *("negative offset", "negative stride", "many axes", "size of floats", "size of booleans", "size and strides"),
    ),
    "without a storage": ("no storage", "tensor as storage"),
    "other than plain floats": ("array of ints", "array of objects", "array of records"),
    "does not fit its": ("array too large", "array too small", "array order"),
    "without bytes or type": ("array of a tensor", "array without type"),
    "does what a file of tensors never does": (
        *("INST", "OBJ of ours", "NEWOBJ of ours", "set", "extension", "big extension", "persistent text", "buffer"),
        *("huge int", "empty file", "zip", "nested nothing"),
    ),
}
REASON = {case: words for words, cases in REASONS.items() for case in cases}
