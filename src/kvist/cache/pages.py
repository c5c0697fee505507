"""Paged storage of one side of one layer: one pool tensor per array, written in place, shared by all rows.

A paged KV cache: a row reaches its pages (blocks) through a page table (block table); a page that several rows share is
counted, and copied before one of them writes into it (copy on write). A full page is never written again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.types import POOL_STEP, ArraySpec, grown


class Pool:
    """Pages of `page` tokens. `tables[r][i]` is the page that holds slots [i·page, (i+1)·page) of row r."""

    def __init__(self, specs: dict[str, ArraySpec], heads: int, page: int, device: torch.device, batch: int):
        self.specs, self.heads, self.page, self.device = specs, heads, page, device
        self.arrays = {name: self._empty(name, 0) for name in specs}
        self.refs: list[int] = []
        self.free: list[int] = []
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self._table: Tensor | None = None
        self.moved = 0  # counts the times that tensors were replaced

    def _empty(self, name: str, pages: int) -> Tensor:
        spec = self.specs[name]
        return torch.empty((pages, *spec.page_shape(self.heads, self.page)), dtype=spec.dtype, device=self.device)

    @property
    def capacity(self) -> int:
        return len(self.refs)

    @property
    def in_use(self) -> int:
        return self.capacity - len(self.free)

    @torch.inference_mode(False)  # what is stored must be writable outside inference mode, too
    @torch.no_grad()
    def resize(self, pages: int) -> None:
        """Make room for `pages` pages in all; never shrinks."""
        extra = pages - self.capacity
        if extra <= 0:
            return
        for name, old in self.arrays.items():
            new = self._empty(name, pages)
            new[: self.capacity] = old
            self.arrays[name] = new
        self.moved += 1
        self.free = list(range(pages - 1, self.capacity - 1, -1)) + self.free
        self.refs += [0] * extra

    def missing(self, row: int, slots: int) -> int:
        """Pages that row `row` still lacks to hold `slots` slots."""
        return max(0, -(-slots // self.page) - len(self.tables[row]))

    def extend(self, row: int, start: int, stop: int) -> None:
        """Give row `row` private pages for slots [start, stop); the pool must have room."""
        table = self.tables[row]
        if start % self.page and self.refs[table[start // self.page]] > 1:
            self._own(row, start // self.page)
        for _ in range(self.missing(row, stop)):
            table.append(self._take())
            self._enter(row, len(table) - 1)

    def _take(self) -> int:
        page = self.free.pop()
        self.refs[page] = 1
        return page

    def _own(self, row: int, index: int) -> None:
        """Replace a page of a row by a copy of its own."""
        old, new = self.tables[row][index], self._take()
        for array in self.arrays.values():
            array[new] = array[old]
        self._drop(old)
        self.tables[row][index] = new
        self._enter(row, index)

    def _enter(self, row: int, index: int) -> None:
        """Tell the tensor of page tables of a new page."""
        if self._table is not None and self.device.type == "cpu" and index < self._table.shape[1]:
            self._table[row, index] = self.tables[row][index]
        else:
            self.forget()

    def forget(self) -> None:
        """The tensor of page tables is out of date."""
        self._table, self.moved = None, self.moved + 1

    def _drop(self, page: int) -> None:
        self.refs[page] -= 1
        if not self.refs[page]:
            self.free.append(page)

    def shared_tail(self, row: int, slot: int) -> bool:
        """Whether writing at `slot` would need a copy of a shared, partly filled page."""
        table, index = self.tables[row], slot // self.page
        return slot % self.page > 0 and index < len(table) and self.refs[table[index]] > 1

    def truncate(self, row: int, before: int, after: int) -> None:
        """Forget slots [after, before) of row `row`. A page that was full and is cut is replaced by a copy."""
        table, keep = self.tables[row], -(-after // self.page)
        for page in table[keep:]:
            self._drop(page)
        del table[keep:]
        if after % self.page and before >= keep * self.page:
            if not self.free:
                self.resize(grown(self.capacity + 1, POOL_STEP))
            self._own(row, keep - 1)
        self.forget()

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was; pages are shared, none is moved."""
        tables = [list(self.tables[row]) for row in rows]
        for table in tables:
            for page in table:
                self.refs[page] += 1
        for table in self.tables:
            for page in table:
                self._drop(page)
        self.tables = tables
        self.forget()

    def write(self, rows: Sequence[int], starts: Sequence[int], arrays: dict[str, Tensor]) -> None:
        """Put encoded tokens of several rows at their start slots; `arrays` as `Codec.encode` gives them."""
        for name, new in arrays.items():
            spec, pool = self.specs[name], self.arrays[name]
            per_page = self.page // spec.stride
            head = spec.kind == "head"
            count = new.shape[2 if head else 1]
            entries = [range(start // spec.stride, start // spec.stride + count) for start in starts]
            first = entries[0].start % per_page
            if first + count <= per_page and len(rows) == 1:
                page = self.tables[rows[0]][entries[0].start // per_page]
                pool[page][..., first : first + count, *(slice(None),) * len(spec.shape)] = new[0]
                continue
            pages = [[self.tables[r][e // per_page] for e in run] for r, run in zip(rows, entries, strict=True)]
            where = [[e % per_page for e in run] for run in entries]
            if count % per_page == 0 and all(run.start % per_page == 0 for run in entries):
                ids = torch.tensor([p[::per_page] for p in pages], device=self.device).flatten()
                paged = new.unflatten(2 if head else 1, (-1, per_page))
                pool[ids] = (paged.transpose(1, 2) if head else paged).flatten(0, 1)
                continue
            page_ids = torch.tensor(pages, device=self.device)
            slots = torch.tensor(where, device=self.device)
            if head:
                heads = torch.arange(self.heads, device=self.device)
                pool[page_ids.unsqueeze(-1), heads, slots.unsqueeze(-1)] = new.transpose(1, 2)
            else:
                pool[page_ids, slots] = new

    def table(self, width: int) -> Tensor:
        """Page tables (B, width), int32; entries beyond a row's pages are 0."""
        if self._table is None or self._table.shape[1] != width:
            padded = [table + [0] * (width - len(table)) for table in self.tables]
            self.forget()
            with torch.inference_mode(False):
                made = torch.tensor(padded, dtype=torch.int32).view(len(padded), width)
                self._table = made.to(self.device, non_blocking=True)  # from pageable memory: nobody waits
        return self._table

    def gather(self, pages: Tensor) -> dict[str, Tensor]:
        """Arrays of pages (B, n) as `Codec.decode` wants them: (B, H, n·page/stride, …) or (B, n·page/stride, …)."""
        found = {}
        for name, spec in self.specs.items():
            taken = self.arrays[name][pages]
            found[name] = taken.transpose(1, 2).flatten(2, 3) if spec.kind == "head" else taken.flatten(1, 2)
        return found

    def entries(self, row: int, groups: Sequence[int], granule: int) -> dict[str, Tensor]:
        """Arrays of whole groups of one row, groups as slot // granule: (H, n·granule/stride, …), rows without H."""
        table, found = self.tables[row], {}
        pages = torch.tensor([table[g * granule // self.page] for g in groups], device=self.device).unsqueeze(-1)
        starts = torch.tensor([g * granule % self.page for g in groups], device=self.device).unsqueeze(-1)
        for name, spec in self.specs.items():
            entry = starts // spec.stride + torch.arange(granule // spec.stride, device=self.device)
            if spec.kind == "head":
                found[name] = self.arrays[name][pages, :, entry].flatten(0, 1).transpose(0, 1)
            else:
                found[name] = self.arrays[name][pages, entry].flatten(0, 1)
        return found

    def to(self, device: torch.device) -> None:
        """Move the storage to another device."""
        self.arrays = {name: array.to(device) for name, array in self.arrays.items()}
        self.device = device
        self.forget()
