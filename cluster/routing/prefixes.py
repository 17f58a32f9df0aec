"""Which replica is expected to hold which blocks: what was sent where, as the pools there would keep it.

For each replica the keys of the blocks it was sent, evicted in the order of its pool: least recently used
first, and the end of a prompt before its beginning. So the known blocks of a prompt are always a prefix of
it, found by bisection. Memory is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from quire.kvstore.books.keys import BlockKey

_HINT_BYTES = 8
MAX_BLOCKS = 1 << 20
"""The most keys over all replicas; about 100 bytes each."""


class KnownBlocks:
    """The known blocks of one replica."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._hints: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hints)

    def resize(self, most: int) -> None:
        """Set the most blocks that the replica holds."""
        self._most = most
        self._trim()

    def match(self, chain: Sequence[BlockKey]) -> int:
        """Count the leading blocks of a prompt that are expected there."""
        return bisect_left(chain, True, key=lambda key: key[:_HINT_BYTES] not in self._hints)

    def used(self, chain: Sequence[BlockKey]) -> None:
        """Record blocks that the replica computes or reads; where they need room, others are evicted."""
        for key in reversed(chain):  # the beginning is used last, and is kept longest
            hint = key[:_HINT_BYTES]
            self._hints[hint] = None
            self._hints.move_to_end(hint)
        self._trim()

    def _trim(self) -> None:
        while len(self._hints) > self._most:
            self._hints.popitem(last=False)
