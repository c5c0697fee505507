"""What a cache keeps for itself: the model that it belongs to, which slots are tokens, and the forward that comes."""

import weakref
from dataclasses import replace

import torch
from torch import Tensor, nn

from kvist.cache.graph import Steps
from kvist.cache.guard import Guard
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.models.adapter import Model


class Inner:
    """Of one cache, for kvist's own rooms; users need none of it.

    describes: the model, as far as its cache is concerned; rows: which slots of each row are tokens, and of which
    positions; guard: whether all layers hold the same tokens. steps: while decode steps are captured, see `graph`;
    upcoming: the position of each row's next token. rotary: keys are stored before their rotary embedding, so that
    positions must be known.
    """

    model: weakref.ref[nn.Module]

    def __init__(self, describes: Model, rows: Rows, guard: Guard, rotary: bool):
        self.describes, self.rows, self.guard, self.rotary = describes, rows, guard, rotary
        self.steps: Steps | None = None
        self.upcoming: list[int] = []
        self._odd_step: Tensor | None = None

    def keep_exact(self, dtype: torch.dtype | None) -> None:
        """Say in which type layers that pack store exact tokens, before there are any; None: as they come."""
        shapes = tuple(replace(shape, exact=dtype) for shape in self.describes.shapes)
        self.describes = replace(self.describes, shapes=shapes)
        for layer in self.ours:
            layer.exact = dtype

    @property
    def ours(self) -> list[Layer]:
        """The layers that kvist stores."""
        return self.guard.ours

    def announce(self, batch: int, slots: int, mask: Tensor | None, positions: Tensor | None = None) -> None:
        """See `Cache.announce`."""
        if self.steps is not None:
            return  # planned already
        past = self.ours[0].slots
        self.rows.crop(past)
        self.rows.check(batch)
        real = None
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"kvist.Cache needs the 2-D padding mask (batch, tokens) to know tokens from padding, found {found}"
                )
            if mask.shape[1] < past + slots:
                raise ValueError(
                    f"the attention mask covers {mask.shape[1]} slots but the cache holds {past} and {slots} come; "
                    "pass the mask of the whole sequence"
                )
            real = mask[:, past : past + slots].bool()
            if mask.device.type == "cpu" or slots > 1:
                self._agree(mask[:, :past])
            else:  # reading the mask would stall every decode step: note what it says, and look at the next occasion
                self._note(~real.all())
                real = None
        self.rows.extend(batch, slots, real, self._positions(batch, slots, positions))
        self.upcoming = self._next(batch, slots, positions)

    def finish(self, returned: bool) -> None:
        """The forward that was heard is over. ValueError where it returned and stored nothing."""
        if self.steps is not None:
            return
        expected = self.rows.slots
        self.rows.crop(self.ours[0].slots)  # what nobody stored is no longer expected
        if returned:
            self.guard.returned(expected, self.describes.name)

    def _positions(self, batch: int, slots: int, positions: Tensor | None) -> Tensor | None:
        """Positions that must be remembered, (B, slots); None where the numbers of the slots will do."""
        if not self.rotary or positions is None:
            return None
        if positions.dim() != 2 or positions.shape[-1] != slots or positions.shape[0] not in (1, batch):
            raise ValueError(
                f"keys are stored before RoPE, which needs position ids of shape (batch, tokens), found "
                f"{tuple(positions.shape)}; use an artefact with keys post-rope"
            )
        positions = positions.expand(batch, -1)
        if positions.device.type == "cpu" or slots > 1 or not self.rows.runs:
            return positions.cpu()
        expected = torch.tensor(self.rows.next_positions()).unsqueeze(-1)
        told = expected.to(positions.device, non_blocking=True)
        self._note((positions != told).any())  # not read here: it would stall the step
        return expected

    def _next(self, batch: int, slots: int, positions: Tensor | None) -> list[int]:
        """The position after those of a forward; single steps on an accelerator, which are not read, move on by one."""
        if positions is None or positions.dim() != 2:
            return [self.rows.slots] * batch
        if slots == 1 and positions.device.type != "cpu" and len(self.upcoming) == batch:
            return [position + 1 for position in self.upcoming]
        return [position + 1 for position in positions[:, -1].expand(batch).tolist()]

    def _note(self, unexpected: Tensor) -> None:
        self._odd_step = unexpected if self._odd_step is None else self._odd_step | unexpected

    def check_free(self) -> None:
        """Refuse what cannot be done while steps are captured."""
        if self.steps is not None:
            raise ValueError("decode steps of this cache are captured: close() them before other calls")

    def forget(self) -> None:
        """Nothing is stored any more."""
        self.rows.runs, self.rows.slots, self._odd_step, self.upcoming = [], 0, None, []

    def check_steps(self) -> None:
        """Refuse to go on where a step that was not read turns out to have masked its own token, or to have skipped a
        position."""
        if self._odd_step is not None and bool(self._odd_step):
            raise ValueError(
                "a decode step on the accelerator, where masks and positions of single steps are not read, masked its "
                "own token or skipped a position; kvist stored it as the next token: pass such steps as chunks of two "
                "or more"
            )

    def _agree(self, mask: Tensor) -> None:
        self.check_steps()
        mask = mask.bool().cpu()
        if self.rows.dense(mask.shape[1]):
            same = bool(mask.all())
        else:
            stored = torch.zeros_like(mask)
            for row in range(self.rows.batch):
                stored[row, self.rows.slot_of(row, mask.device)] = True
            same = torch.equal(stored, mask)
        if not same:
            raise ValueError(
                "the attention mask differs from the one with which earlier tokens were stored; a stored token cannot "
                "be masked later: start a new cache"
            )
