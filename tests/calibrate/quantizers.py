"""Quantizer files to KVQuant's published layout, right and wrong ones."""

import io
import pickle
import pickletools

import numpy as np
import torch

LAYERS, CHANNELS, TOKENS = 2, 64, 6  # of models_tiny: 2 KV heads of 32
LLAMA, BLOCKS = "model.layers.{}.self_attn.{}_proj", "transformer.blocks.{}.{}_proj"


def thresholds(shape, dtype=torch.float32, seed=0):
    """Upper and lower ones of a few units, one-signed in some channels."""
    generator = torch.Generator().manual_seed(seed)
    middle, half = torch.randn(shape, generator=generator) * 3, torch.rand(shape, generator=generator) + 0.01
    return (middle + half).to(dtype), (middle - half).to(dtype)


def codebook(bits=3, dtype=np.float32, seed=0):
    """Centroids in the order in which k-means left them."""
    return [np.random.default_rng(seed).uniform(-1, 1, (2**bits, 1)).astype(dtype)]


def entries(
    items=3, bits=3, dtype=torch.float32, form=LLAMA, layers=LAYERS, channels=CHANNELS, points=np.float32, extra=()
):
    """The dict of a quantizer file: tuples of 2, 3 or 5, and what follows them."""
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    found = {}
    for i in range(layers):
        for side, shape in (("k", (1, channels)), ("v", (TOKENS, 1))):
            seed = 2 * i + (side == "v")
            norm = (torch.tensor(1.1 + seed / 7, dtype=scalar), torch.tensor(seed / 30 - 0.05, dtype=scalar))
            parts = (*thresholds(shape, dtype, seed), codebook(bits, points, seed), *norm)
            found[form.format(i, side)] = (*parts[:items], *extra)
    return found


def dump(found) -> bytes:
    return pickle.dumps(found, protocol=pickle.HIGHEST_PROTOCOL)


def unframed(data: bytes) -> bytes:
    """Without frames, which are optional."""
    frames = [at for opcode, _, at in pickletools.genops(data) if opcode.name == "FRAME"]
    for at in reversed(frames):
        data = data[:at] + data[at + 9 :]
    return data


def old_numpy(data: bytes) -> bytes:
    """As numpy 1 names it. Frames go, as their lengths would change."""
    data = unframed(data)
    assert data.count(b"\x8c\x13numpy._core.numeric") == 1
    return data.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")


def file(tmp_path, found, name="quantizer.pickle"):
    path = tmp_path / name
    path.write_bytes(found if isinstance(found, bytes) else dump(found))
    return path


def broken(**changes):
    """entries() with items of layer 1's keys replaced by position."""
    found = entries(items=5)
    entry = list(found[LLAMA.format(1, "k")])
    for at, item in changes.items():
        entry[int(at[1:])] = item
    found[LLAMA.format(1, "k")] = tuple(entry)
    return found


def without(name):
    return {key: entry for key, entry in entries().items() if key != name}


def lone(value):
    return torch.full((1, CHANNELS), value)


class Reduced:
    """Pickles as a call of anything with anything."""

    def __init__(self, call, *args):
        self.parts = (call, args)

    def __reduce__(self):
        return self.parts


def nested(payload: bytes, where=0) -> dict:
    """A tensor whose bytes are `payload`."""
    storage = Reduced(torch.storage._load_from_bytes, payload)
    return broken(**{f"_{where}": Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (1, 4), (4, 1), False, {})})


def typed(count):
    storage = torch.arange(float(count)).untyped_storage()
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)


def legacy(**changes) -> bytes:
    """A nested torch.save of 4 floats, with parts replaced."""
    made = io.BytesIO()
    torch.save(typed(4), made, _use_new_zipfile_serialization=False)
    data = made.getvalue()
    for old, new in changes.values():
        assert old in data
        data = data.replace(old, new)
    return data


def tensor_of(offset, size, stride) -> dict:
    return broken(_0=Reduced(torch._utils._rebuild_tensor_v2, typed(8), offset, size, stride, False, {}))


def array_of(*args) -> dict:
    from numpy._core.numeric import _frombuffer

    return broken(_2=[Reduced(_frombuffer, *args)])


def persistent() -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return "outside" if isinstance(obj, torch.Tensor) else None

    made = io.BytesIO()
    Pickler(made, protocol=5).dump(entries())
    return made.getvalue()
