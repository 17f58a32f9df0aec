"""Which replica is thought to hold which blocks, and what waiting for those that hold a prefix has cost.

For each replica the keys of the blocks it was sent, forgotten in the order in which its pool forgets: least
recently used first, and the end of a prompt before its beginning. So what is known of a prompt at a replica
is always a beginning of it, found by bisection. Memory is bounded, however long it runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from quire.kvstore.keys import BlockKey

_HINT_BYTES = 8
MAX_BLOCKS = 1 << 20
"""Over all replicas; about 100 bytes each."""
_MOST_RENTS = 4096
"""Prefixes that nobody has waited for lately are forgotten."""


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
        """The replica computes or reads these."""
        for key in reversed(chain):  # the beginning is used last, and stays longest
            hint = key[:_HINT_BYTES]
            self._hints[hint] = None
            self._hints.move_to_end(hint)
        self._trim()

    def _trim(self) -> None:
        while len(self._hints) > self._most:
            self._hints.popitem(last=False)


class Rents:
    """What requests have paid for waiting where their prefix is, by the key of its last block."""

    def __init__(self) -> None:
        self._paid_s: OrderedDict[bytes, float] = OrderedDict()

    def paid_s(self, prefix: BlockKey) -> float:
        """Since it was last computed somewhere."""
        return self._paid_s.get(prefix[:_HINT_BYTES], 0.0)

    def pay(self, prefix: BlockKey, seconds: float) -> None:
        """One request has waited so long."""
        hint = prefix[:_HINT_BYTES]
        self._paid_s[hint] = self._paid_s.pop(hint, 0.0) + seconds
        while len(self._paid_s) > _MOST_RENTS:
            self._paid_s.popitem(last=False)

    def bought(self, prefix: BlockKey) -> None:
        """One more replica has it."""
        self._paid_s.pop(prefix[:_HINT_BYTES], None)
