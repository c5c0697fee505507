"""Launches happen on the device that their tensors are on, which need not be the current one: models are sharded."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def on_its_device(run: Callable) -> Callable:
    """`run`, with the device of its first tensor (or of the first dictionary of tensors) as the current one."""

    @wraps(run)
    def guarded(*args, **options):
        first = next((x for x in args if isinstance(x, (Tensor, dict))), None)
        if first is None:  # refused by what is run
            return run(*args, **options)
        device = (next(iter(first.values())) if isinstance(first, dict) else first).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*args, **options)
        with torch.cuda.device(device):
            return run(*args, **options)

    return guarded
