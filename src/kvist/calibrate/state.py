"""How far a long run has come, on disk: it goes on from there when it is started again."""

import json
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvist.atomic import replacing

NAME = "progress.safetensors"
EVERY = 20.0  # seconds between two saves


class State:
    """Named tensors that grow sample by sample, stage after stage. `key` says what the run is: progress of another run
    is not used. `done`: samples that each stage has seen."""

    def __init__(self, folder: Path, key: str, name: str = NAME):
        self.path, self.key = folder / name, key
        self.tensors: dict[str, Tensor] = {}
        self.done: dict[str, int] = {}
        self._saved = time.monotonic()
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("kvist", "{}"))
                if about.get("key") == self.key:
                    self.tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                    self.done = about["done"]
        except (OSError, SafetensorError, ValueError):
            return  # a torn file is no progress: begin anew

    def step(self, stage: str, sample: int) -> None:
        """A stage has seen so many samples; kept on disk now and then."""
        self.done[stage] = sample
        if time.monotonic() - self._saved > EVERY:
            self.save()

    def save(self) -> None:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as scratch:
            save_file(tensors, scratch, {"kvist": json.dumps({"key": self.key, "done": self.done})})
        self._saved = time.monotonic()

    def clear(self) -> None:
        """The run is complete."""
        self.path.unlink(missing_ok=True)
