"""Which replicas say that they hold which blocks. Hints only: the owner decides, so nothing need be exact.

Knows no Ray (`directory_actor.py`) and no time but what it is told. A block is remembered by the first 8
bytes of its key: two blocks that share them cost a refused offer, never a wrong answer.

Memory is bounded: an entry names at most four owners (the newest and the three oldest), and where a bucket
is full the entry that was made longest ago goes. Entries of owners that are gone are skipped at once and
swept little by little.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.ids import ReplicaId

HINT_BYTES = 8
MAX_OWNERS = 4
_BUCKETS = 256


@dataclass(frozen=True, slots=True)
class Announcement:
    """What changed at one owner since its announcement before."""

    owner: ReplicaId
    number: int
    """0 starts again: whatever the owner announced before is forgotten. Otherwise one more than the last."""
    added: bytes
    """Hints of `HINT_BYTES` each, one after the other."""
    removed: bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """An owner and how many leading blocks of a chain it says it holds."""

    owner: ReplicaId
    blocks: int


@dataclass(frozen=True, slots=True)
class DirectoryStats:
    entries: int
    owners: int
    lookups: int
    announcements: int
    evicted: int
    """Entries that went because a bucket was full."""


@dataclass(slots=True)
class _Owner:
    name: ReplicaId
    number: int
    heard_s: float


Entry = int | tuple[int, ...]
"""Owners by number; a bare one where it is alone, which saves half of an entry's memory."""


class Directory:
    """The map, and the owners that are believed to live."""

    def __init__(self, max_entries: int, silence_s: float = 30.0) -> None:
        """An owner that says nothing for `silence_s`, not even an empty announcement, is gone."""
        if max_entries < _BUCKETS:
            raise ValueError(f"a directory has room for at least {_BUCKETS} entries, got {max_entries}")
        self._bound, self._silence_s = max_entries // _BUCKETS, silence_s
        self._buckets: list[dict[int, Entry]] = [{} for _ in range(_BUCKETS)]
        self._owners: dict[int, _Owner] = {}  # by index; a restarted owner has another index
        self._index_of: dict[ReplicaId, int] = {}
        self._next_index = 0
        self._unswept: list[dict[int, Entry]] = []
        self._looked_s = float("-inf")
        self._lookups = self._announcements = self._evicted = 0

    def stats(self) -> DirectoryStats:
        entries = sum(map(len, self._buckets))
        return DirectoryStats(entries, len(self._owners), self._lookups, self._announcements, self._evicted)

    def announce(self, said: Announcement, now_s: float) -> bool:
        """Take it in. False: something is missing in between, start again with number 0."""
        self._announcements += 1
        self._forget_the_silent(now_s)
        self._sweep()
        index = self._index_of.get(said.owner)
        if said.number == 0:
            self.gone(said.owner)
            index = self._index_of[said.owner] = self._next_index
            self._owners[index] = _Owner(said.owner, 0, now_s)
            self._next_index += 1
        elif index is None or self._owners[index].number + 1 != said.number:
            return False
        owner = self._owners[index]
        owner.number, owner.heard_s = said.number, now_s
        for hint in _hints(said.removed):
            self._remove(hint, index)
        for hint in _hints(said.added):
            self._add(hint, index)
        return True

    def gone(self, owner: ReplicaId) -> None:
        """An owner is dead: its entries are skipped from now on."""
        index = self._index_of.pop(owner, None)
        if index is not None:
            del self._owners[index]
            self._unswept = list(self._buckets)

    def owners(self) -> tuple[ReplicaId, ...]:
        """All that are believed to live."""
        return tuple(self._index_of)

    def lookup(self, chain: Sequence[BlockKey]) -> tuple[Holder, ...]:
        """Who holds the most leading blocks of a chain, best first; none that does not hold the first."""
        self._lookups += 1
        reach: dict[int, int] = {}
        open_: set[int] | None = None
        for at, key in enumerate(chain):
            entry = self._buckets[key[0]].get(_hint(key))
            here = set() if entry is None else _members(entry)
            open_ = here if open_ is None else open_ & here
            if not open_:
                break
            for index in open_:
                reach[index] = at + 1
        holders = [Holder(self._owners[i].name, n) for i, n in reach.items() if i in self._owners]
        return tuple(sorted(holders, key=lambda holder: -holder.blocks))

    def _add(self, hint: int, index: int) -> None:
        bucket = self._buckets[hint >> 56]
        entry = bucket.get(hint)
        if entry is None:
            if len(bucket) >= self._bound:
                del bucket[next(iter(bucket))]
                self._evicted += 1
            bucket[hint] = index
            return
        alive = [i for i in sorted(_members(entry)) if i in self._owners and i != index]
        bucket[hint] = _entry([*alive[: MAX_OWNERS - 1], index])

    def _remove(self, hint: int, index: int) -> None:
        bucket = self._buckets[hint >> 56]
        entry = bucket.get(hint)
        if entry is None:
            return
        left = _members(entry) - {index}
        if left:
            bucket[hint] = _entry(sorted(left))
        else:
            del bucket[hint]

    def _forget_the_silent(self, now_s: float) -> None:
        if now_s - self._looked_s < self._silence_s / 30:
            return
        self._looked_s = now_s
        silent = [o.name for o in self._owners.values() if o.heard_s + self._silence_s < now_s]
        for name in silent:
            self.gone(name)

    def _sweep(self) -> None:
        """One bucket an announcement, while there may be entries that no living owner holds."""
        if self._unswept:
            bucket = self._unswept.pop()
            dead = [hint for hint, entry in bucket.items() if not _members(entry) & self._owners.keys()]
            for hint in dead:
                del bucket[hint]


def hints_of(keys: Iterable[BlockKey]) -> bytes:
    """What announcements carry of keys."""
    return b"".join(key[:HINT_BYTES] for key in keys)


def _hint(key: bytes) -> int:
    return int.from_bytes(key[:HINT_BYTES], "big")


def _hints(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(data) // HINT_BYTES}Q", data)


def _members(entry: Entry) -> set[int]:
    return {entry} if isinstance(entry, int) else set(entry)


def _entry(indices: Sequence[int]) -> Entry:
    return indices[0] if len(indices) == 1 else tuple(indices)
