"""Are the ports faithful? Checks that come before any comparison of methods is believed."""

import torch
from torch import Tensor
from transformers import DynamicCache

from kvist.cache.cache import Cache
from kvist.evaluate.generation import read, states_of
from kvist.methods import parse

STREAMED = ("kivi:2", "kivi:4", "logquant:2", "streaming:2", "kvmix:2", "hadamard:4", "int4")
PIECES = (1, 7, 32)  # tokens per update


@torch.no_grad()
def gates(model, windows: Tensor) -> list[dict]:
    """Each check in words, whether it holds, and what was found, on windows (n, T) of a text."""
    cache, mask = DynamicCache(config=model.config), torch.ones_like(windows)
    read(model, cache, windows, mask, windows.shape[1])
    states = {i: state for i, state in enumerate(states_of(cache)) if isinstance(state, tuple)}
    return [streamed(model, states, name) for name in STREAMED]


def streamed(model, states: dict[int, tuple[Tensor, Tensor]], method: str) -> dict:
    """The same keys and values, given at once or in pieces, are stored as the same numbers: of the tokens that are
    packed in both, the decoded values are compared bit by bit."""
    length = next(iter(states.values()))[0].shape[2]
    at_once, different, compared = _stored(model, states, method, length), 0, 0
    for piece in PIECES:
        pieces = _stored(model, states, method, piece)
        for one, other in zip(at_once, pieces, strict=True):
            length = min(one.shape[2], other.shape[2])
            different += int((one[:, :, :length] != other[:, :, :length]).sum())
            compared += one[:, :, :length].numel()
    chunking = parse(method).chunking
    return {
        "gate": f"{method}: stored at once = stored in updates of {', '.join(map(str, PIECES))}",
        "holds": different == 0,
        "found": f"{different} of {compared} decoded numbers differ" + (f" ({chunking})" if chunking else ""),
    }


def _stored(model, states, method: str, piece: int) -> list[Tensor]:
    """Decoded packed tokens (B, H, T, D) of keys and of values of all layers, after updates of `piece` tokens."""
    batch, _, length, _ = next(iter(states.values()))[0].shape
    cache, found = Cache(model, method, reserve=length), []
    for start in range(0, length, piece):
        part = slice(start, min(start + piece, length))
        cache.announce(batch, part.stop - part.start, None)
        for i, (keys, values) in states.items():
            cache.update(keys[:, :, part], values[:, :, part], i)
    for layer in cache.inner.ours:
        for track in layer.tracks:
            count = min(track.frontiers)
            rows = [track.decode(row, range(count), layer.maps[row]) for row in range(batch)]
            found.append(torch.stack(rows))
    cache.close()
    return found
