"""Which replica is thought to hold which blocks: what was sent where, as the pools there would keep it.

For each replica the keys of the blocks it was sent, forgotten in the order in which its pool forgets: least
recently used first, and the end of a prompt before its beginning. So what is known of a prompt at a replica
is always a beginning of it, found by bisection. Memory is bounded, however long it runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from quire.kvstore.books.keys import BlockKey

_HINT_BYTES = 8
MAX_BLOCKS = 1 << 20
"""Over all replicas; about 100 bytes each."""


class KnownBlocks:
    """One replica's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._hints: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hints)

    def resize(self, most: int) -> None:
        """It holds so many blocks at most."""
        self._most = most
        self._trim()

    def match(self, chain: Sequence[BlockKey]) -> int:
        """Leading blocks of a prompt that are thought to be there."""
        return bisect_left(chain, True, key=lambda key: key[:_HINT_BYTES] not in self._hints)

    def used(self, chain: Sequence[BlockKey]) -> None:
        """The replica computes or reads these; where they need room, others are forgotten."""
        for key in reversed(chain):  # the beginning is used last, and stays longest
            hint = key[:_HINT_BYTES]
            self._hints[hint] = None
            self._hints.move_to_end(hint)
        self._trim()

    def _trim(self) -> None:
        while len(self._hints) > self._most:
            self._hints.popitem(last=False)
