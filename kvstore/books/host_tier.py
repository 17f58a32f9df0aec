"""Host memory behind the pool: blocks that make room there keep their bytes here, and come back on a hit.

Two halves, as in the pool: the books (`HostTier`, one a replica, pure) say which slot holds which block; the
bytes (`HostPages`, one a shard) have the same slot numbers. Copies are carried out on every shard in the
order in which the books gave them out, and before the step that follows: then neither a page nor a slot is
used again too early.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

import torch
from msgspec import Struct
from torch import Tensor

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.pool import IntegrityError
from quire.kvstore.books.prefix_index import PageId

SlotId = NewType("SlotId", int)


class Copies(Struct, frozen=True):
    """Pages of the pool and slots of the host tier, pair by pair. For all shards."""

    pages: tuple[PageId, ...]
    slots: tuple[SlotId, ...]


@dataclass(slots=True)
class HostTierStats:
    demoted: int = 0
    promoted: int = 0
    dropped: int = 0
    """Blocks that made room here, too, and are gone."""


class HostTier:
    """Which block is in which slot; the least recently used one makes room."""

    def __init__(self, slots: int) -> None:
        """No slots: everything is dropped."""
        self.stats = HostTierStats()
        self._total = slots
        self._free = [SlotId(slot) for slot in reversed(range(slots))]
        self._slot_of: OrderedDict[BlockKey, SlotId] = OrderedDict()

    @property
    def slots(self) -> int:
        return self._total

    @property
    def used(self) -> int:
        return len(self._slot_of)

    def demote(self, evicted: Sequence[tuple[BlockKey, PageId]]) -> Copies:
        """Keep what the pool evicts (`PagePool`'s `evicted`): copies due before the pages are written.

        A block that is here already is not copied: its bytes are the same.
        """
        pages, slots = [], []
        new = [(key, page) for key, page in evicted if not self._touch(key)]
        self.stats.dropped += max(len(new) - self._total, 0)
        for key, page in new[max(len(new) - self._total, 0) :]:
            slot = self._take_slot()
            self._slot_of[key] = slot
            pages.append(page)
            slots.append(slot)
        self.stats.demoted += len(slots)
        return Copies(tuple(pages), tuple(slots))

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks of `keys` are here. They are the last to make room from now on."""
        count = next((i for i, key in enumerate(keys) if key not in self._slot_of), len(keys))
        self._used(keys[:count])
        return count

    def promote(self, keys: Sequence[BlockKey], pages: Sequence[PageId]) -> Copies:
        """Bring blocks that are here (`match`) into newly allocated pages. They stay here, too."""
        slots = [self._slot_of[key] for key in keys]
        self._used(keys)
        self.stats.promoted += len(slots)
        return Copies(tuple(pages), tuple(slots))

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """These blocks may be damaged (`PagePool.withdraw`)."""
        for key in keys:
            slot = self._slot_of.pop(key, None)
            if slot is not None:
                self._free.append(slot)

    def check(self) -> None:
        """Raises IntegrityError where a slot is lost or used twice."""
        slots = [*self._free, *self._slot_of.values()]
        if sorted(slots) != list(range(self._total)):
            raise IntegrityError(
                f"{len(slots)} of {self._total} host slots are accounted for, or one is twice"
            )

    def _used(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):  # a chain's last block goes first
            self._slot_of.move_to_end(key)

    def _touch(self, key: BlockKey) -> bool:
        if key not in self._slot_of:
            return False
        self._slot_of.move_to_end(key)
        return True

    def _take_slot(self) -> SlotId:
        if self._free:
            return self._free.pop()
        _, slot = self._slot_of.popitem(last=False)
        self.stats.dropped += 1
        return slot


class HostPages:
    """One shard's bytes. On CUDA in pinned memory: copies run beside the CPU, in the order of the stream."""

    def __init__(self, pool_NB: Tensor, slots: int) -> None:
        self._pool_NB = pool_NB
        self._host_SB = torch.empty(
            (slots, pool_NB.shape[1]), dtype=torch.uint8, pin_memory=pool_NB.device.type == "cuda"
        )

    def demote(self, copies: Copies) -> None:
        """Pool to host."""
        for page, slot in zip(copies.pages, copies.slots, strict=True):
            self._host_SB[slot].copy_(self._pool_NB[page], non_blocking=True)

    def promote(self, copies: Copies) -> None:
        """Host to pool."""
        for page, slot in zip(copies.pages, copies.slots, strict=True):
            self._pool_NB[page].copy_(self._host_SB[slot], non_blocking=True)
