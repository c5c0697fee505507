"""A pickle of tensors and arrays read as data: nothing that a file names is imported, and nothing of it is called.

A machine of its own over the opcodes, and not `pickle.Unpickler` with a list of allowed names: that one sets memory
aside for what a file declares before it reads it, and hashes keys nested as deep as the file likes. Only the opcodes
and names that protocol 5 needs for dicts, lists, tuples, torch's tensors and numpy's arrays are known here.
"""

import io
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_BYTES = 1 << 30
MOST_STEPS = 1 << 20  # opcodes; a file of 32 layers has 12 thousand
MOST_NESTED = 200  # in each of the pickles inside a storage, which have 40
MOST_AXES = 4
MAGIC, VERSION = (
    0x1950A86A20F9469CFC6C,
    1001,
)  # of torch.save before it wrote zip files; tensors in a pickle still use it
KINDS = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16}
CODES = ("f2", "f4", "f8")
MARK = object()
PLAIN = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
}
FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: MARK,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS, GETS = ("MEMOIZE", "BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
NAMES = ("GLOBAL", "STACK_GLOBAL")
FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS")
KNOWN = {*PLAIN, *FIXED, *TUPLES, *PUTS, *GETS, *NAMES, *FILLS, "PROTO", "FRAME", "TUPLE", "REDUCE", "BUILD"}
KNOWN |= {"BINPERSID", "STOP"}
OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes if opcode.name in KNOWN}


@dataclass(frozen=True)
class Maker:
    """One of our own constructors, in the place of a name in the file."""

    make: Callable[[tuple], Any]


@dataclass
class Kind:
    """A numpy type: its code, and its byte order once that is known."""

    code: str
    order: str = "<"

    def build(self, state) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) == 8 else None
        if not isinstance(order, str) or order not in ("<", ">"):
            raise ValueError("it has an array of a type other than plain floats")
        self.order = order


@dataclass(frozen=True)
class Declared:
    """What a nested storage says of itself."""

    dtype: torch.dtype
    key: str
    count: int


def read(data: bytes) -> Any:
    """The object in a pickle: dicts with text as keys, lists, tuples, text, bytes, numbers, None, tensors and arrays of
    floats (views of one memory, never copied). Raises ValueError with the reason for anything else."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, expected at most {MOST_BYTES}")
    stream = io.BytesIO(data)
    found = run(stream, _Makers(len(data)).names)
    if stream.tell() != len(data):
        raise ValueError("it goes on after its end")
    return found


def run(
    stream: io.BytesIO,
    names: dict[tuple[str, str], Any],
    most: int = MOST_STEPS,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Run one pickle from where the stream stands to its STOP, in `most` opcodes. names: what each allowed global
    stands for."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    size = stream.getbuffer().nbytes

    def pop() -> Any:
        if not stack or stack[-1] is MARK:
            raise ValueError("it takes more from its stack than it put there")
        return stack.pop()

    def pop_to_mark() -> list[Any]:
        items = []
        while stack and stack[-1] is not MARK:
            items.append(stack.pop())
        if not stack:
            raise ValueError("it takes more from its stack than it put there")
        stack.pop()
        return items[::-1]

    for _ in range(most):
        where = stream.tell()
        opcode = OPCODES.get(stream.read(1))
        if opcode is None:
            raise ValueError(f"at byte {where} it is cut off, damaged, or does what a file of tensors never does")
        name = opcode.name
        if name == "GLOBAL":
            arg: Any = tuple(stream.readline().rstrip(b"\n").decode("latin-1") for _ in range(2))
        else:
            arg = opcode.arg.reader(stream) if opcode.arg else None  # never more than there is
        if name == "STOP":
            found = pop()
            if stack:
                raise ValueError("it leaves more than one object")
            return found
        if name in PLAIN:
            stack.append(arg)
        elif name in FIXED:
            stack.append(FIXED[name]())
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in TUPLES:
            stack.append(tuple([pop() for _ in range(TUPLES[name])][::-1]))
        elif name in FILLS:
            items = pop_to_mark() if name.endswith("S") else [pop() for _ in range(1 + (name == "SETITEM"))][::-1]
            _fill(stack[-1] if stack else None, items, "ITEM" in name)
        elif name in PUTS:
            stack.append(pop())
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in GETS:
            if arg not in memo:
                raise ValueError("it refers to what it has not read yet")
            stack.append(memo[arg])
        elif name in NAMES:
            stack.append(_allowed(arg or (pop(), pop())[::-1], names))
        elif name == "REDUCE":
            args, maker = pop(), pop()
            if not (isinstance(maker, Maker) and isinstance(args, tuple)):
                raise ValueError("it calls something that is no constructor of tensors or arrays")
            stack.append(maker.make(args))
        elif name == "BUILD":
            state, target = pop(), stack[-1] if stack else None
            if not isinstance(target, Kind):
                raise ValueError("it sets the state of an object other than an array's type")
            target.build(state)
        elif name == "BINPERSID":
            if persistent is None:
                raise ValueError("it refers to an object outside itself")
            stack.append(persistent(pop()))
        elif arg > (5 if name == "PROTO" else size - stream.tell()):
            raise ValueError(f"it declares a {name.lower()} of {arg}, more than there can be")
    raise ValueError(f"it has more than {most} opcodes")


def _fill(target: Any, items: list, pairs: bool) -> None:
    if isinstance(target, list) and not pairs:
        target.extend(items)
    elif isinstance(target, dict) and pairs and len(items) % 2 == 0:
        if not all(isinstance(key, str) for key in items[::2]):
            raise ValueError("it has a dict with keys other than text")
        target.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise ValueError("it fills something that is no list or dict")


def _allowed(words: tuple, names: dict[tuple[str, str], Any]) -> Any:
    if not all(isinstance(word, str) for word in words):
        raise ValueError("it names a global by something other than text")
    if words not in names:
        raise ValueError(
            f"it names {ascii('.'.join(words))[1:-1][:80]}, which no file of tensors needs; none of it ran"
        )
    return names[words]


class _Makers:
    """The constructors. budget: bytes that storages may hold in all, so that no byte of the file is decoded twice."""

    def __init__(self, budget: int):
        self.left = budget
        makers = {
            ("collections", "OrderedDict"): _empty,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch.storage", "_load_from_bytes"): self.storage,
            ("numpy", "dtype"): _kind,
            ("numpy.core.numeric", "_frombuffer"): _array,
            ("numpy._core.numeric", "_frombuffer"): _array,
        }
        self.names = {words: Maker(make) for words, make in makers.items()}

    def storage(self, args: tuple) -> Tensor:
        """A nested torch.save of a storage, as a tensor (n,). It is decoded by torch, weights_only, after what it
        declares was found to be what is there: torch sets memory aside for that first."""
        if not (len(args) == 1 and isinstance(args[0], bytes)):
            raise ValueError("it has a tensor without bytes")
        self.left -= len(args[0])
        if self.left < 0:
            raise ValueError("its tensors use the same bytes several times")
        declared = _declared(args[0])
        try:
            loaded = torch.load(io.BytesIO(args[0]), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged bytes
            raise ValueError("the bytes of a tensor are damaged") from error
        if not (isinstance(loaded, torch.storage.TypedStorage) and loaded.dtype == declared.dtype):
            raise ValueError("the bytes of a tensor hold something else")
        return torch.empty(0, dtype=declared.dtype).set_(loaded._untyped_storage)  # pyright: ignore


def _declared(data: bytes) -> Declared:
    """The header of a nested storage, checked against the bytes that follow it."""
    if data[:4] == b"PK\x03\x04":
        raise ValueError("the bytes of a tensor are a zip file, which torch never puts into a pickle")
    stream = io.BytesIO(data)
    magic, version, system = (run(stream, {}, MOST_NESTED) for _ in range(3))
    if (magic, version) != (MAGIC, VERSION) or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("the bytes of a tensor are not as torch writes them on a little-endian machine")
    storages = {("torch", kind): dtype for kind, dtype in KINDS.items()}
    found, keys = run(stream, storages, MOST_NESTED, _persistent), run(stream, {}, MOST_NESTED)
    if not isinstance(found, Declared) or keys != [found.key]:
        raise ValueError("the bytes of a tensor hold more or less than one storage")
    head, body = stream.read(8), len(data) - stream.tell()
    if len(head) < 8 or struct.unpack("<q", head)[0] != found.count or body != found.count * found.dtype.itemsize:
        raise ValueError(f"a tensor declares {found.count} numbers and has {body} bytes")
    return found


def _persistent(saved: Any) -> Declared:
    if isinstance(saved, tuple) and len(saved) == 6:
        word, dtype, key, place, count, view = saved
        texts = all(isinstance(text, str) for text in (key, place))
        if word == "storage" and isinstance(dtype, torch.dtype) and texts and _whole(count) and view is None:
            return Declared(dtype, key, count)
    raise ValueError("the bytes of a tensor hold something else than a storage of floats")


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and len(shape) <= MOST_AXES and all(_whole(n) for n in shape)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _empty(args: tuple) -> dict:
    if args:
        raise ValueError("it has an ordered dict where tensors have an empty one")
    return {}


def _tensor(args: tuple) -> Tensor:
    """storage, offset, shape, strides, and what autograd wants, which is not looked at."""
    if len(args) not in (6, 7) or not isinstance(args[0], Tensor) or args[0].ndim != 1:
        raise ValueError("it has a tensor without a storage")
    storage, offset, shape, strides = args[:4]
    if not (_whole(offset) and _shape(shape) and _shape(strides) and len(shape) == len(strides)):
        raise ValueError("it has a tensor of no shape")
    strides = tuple(stride if n > 1 else 1 for n, stride in zip(shape, strides, strict=True))
    count = _product(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if not 0 < count <= len(storage) or last >= len(storage):
        raise ValueError(f"it has a tensor that is empty or reaches beyond its {len(storage)} numbers")
    return storage.as_strided(shape, strides, offset)


def _kind(args: tuple) -> Kind:
    if not (args and isinstance(args[0], str) and args[0] in CODES):
        raise ValueError("it has an array of a type other than plain floats")
    return Kind(args[0])


def _array(args: tuple) -> np.ndarray:
    """buffer, type, shape, order."""
    if len(args) != 4 or not isinstance(args[0], bytes | bytearray) or not isinstance(args[1], Kind):
        raise ValueError("it has an array without bytes or type")
    buffer, kind, shape, order = args
    dtype = np.dtype(kind.order + kind.code)
    fits = _shape(shape) and _product(shape) * dtype.itemsize == len(buffer) > 0
    if not (fits and isinstance(order, str) and order in ("C", "F")):
        raise ValueError(f"it has an array whose shape does not fit its {len(buffer)} bytes")
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)
