"""One attention layer of the cache: transformers' layer protocol over a store.

Order of an update: settle what earlier updates left to be packed, append the new tokens, pack at once those of a long
update that no crop of up to `HOLD` tokens can reach, and hand out views of what is stored.
"""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvist.cache import step
from kvist.cache.handle import Handle
from kvist.cache.rows import Rows
from kvist.cache.store import Store
from kvist.cache.view import View
from kvist.plan import LayerPlan
from kvist.types import HOLD


def _refuse(value: Tensor | None) -> None:
    if value is not None:
        raise AttributeError(
            "keys and values of a kvist layer are packed, and are not assigned: update(keys, values) adds tokens, "
            "crop(-k) and reset() take them away, and a new cache starts from others"
        )


class Layer(Store, CacheLayerMixin):
    """What transformers asks of a layer of a cache; what is stored, and how, is the store's matter."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, plan: LayerPlan, page: int, prefill: str, reserve: int, rows: Rows):
        Store.__init__(self, plan, page, reserve, rows)
        CacheLayerMixin.__init__(self)
        self.prefill = prefill

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self.clear()

    @property
    def is_initialized(self) -> bool:
        return self.made

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Whether there is storage is known from the store."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.make(key_states, value_states)

    @property
    def keys(self) -> Handle | None:
        """All keys, for what looks into a layer: (B, H, slots, D) as attention is given them; None before the first."""
        return Handle(View.after(self), 0) if self.slots else None

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        _refuse(keys)

    @property
    def values(self) -> Handle | None:
        """All values, as `keys`."""
        return Handle(View.after(self), 1) if self.slots else None

    @values.setter
    def values(self, values: Tensor | None) -> None:
        _refuse(values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, T, D); return keys and values of all slots: tensors where nothing is
        packed, otherwise handles that attention reads packed and anything else reads as dense tensors."""
        slots = key_states.shape[2]
        if not self.slots or slots > HOLD:
            return self._update(key_states, value_states)
        self.check(key_states, value_states)
        if key_states.device != self.device:
            self.to(key_states.device)
        move = (self.standing or self.stand).move(slots)
        if not step.take(self, move, key_states, value_states):
            return self._update(key_states, value_states)
        view = View(self, None, self.slots, move)
        if not self.packs:
            return view.dense(0), view.dense(1)
        lead = (len(self.lengths), self.shape.heads, self.slots)
        return Handle.both(view, (*lead, self.shape.key_dim), (*lead, self.shape.value_dim))

    @torch.inference_mode(False)  # what is stored must be writable outside inference mode, too
    @torch.no_grad()
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The way of prompts, and of steps that no kernel takes."""
        batch, _, slots, _ = key_states.shape
        self.check(key_states, value_states)
        if not self.made:
            self.make(key_states, value_states)
        self.to(key_states.device)
        columns = [self.rows.columns(row, self.slots, self.slots + slots) for row in range(batch)]
        counts = [sum(n for _, n in stretches) for stretches in columns]
        given, kept = (key_states.detach(), value_states.detach()), self.kept(key_states, value_states)
        self.settle()
        long, empty = max(counts) > HOLD, self.slots == 0
        chunked = long and self.prefill == "exact" and self.plan.packs
        view = View.before(self, *given) if chunked and not empty else None
        self.append(*kept, columns, counts)
        self.slots, self.updates, self.settled = self.slots + slots, self.updates + 1, False
        self.changed()
        if empty and chunked:
            return key_states, value_states
        if empty and not long:
            return kept[0].to(self.dtype), kept[1].to(self.dtype)
        if not self.plan.packs:
            view = View.after(self)
            return view.dense(0), view.dense(1)
        view = view or View.after(self)
        return Handle(view, 0), Handle(view, 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise ValueError(
            "kvist caches are not offloaded to the CPU: they are small enough to stay; use offloading=False"
        )

    prefetch = offload
