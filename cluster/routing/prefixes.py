"""Which replica is thought to hold which blocks, and what waiting for those that hold a prefix has cost.

For each replica the keys of the blocks it was sent, forgotten in the order in which its pool forgets: least
recently used first, and the end of a prompt before its beginning. So what is known of a prompt at a replica
is always a beginning of it, found by bisection. Memory is bounded, however long it runs.
"""

from __future__ import annotations

import math
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

    def used(self, chain: Sequence[BlockKey]) -> int:
        """The replica computes or reads these; so many others are forgotten for them."""
        for key in reversed(chain):  # the beginning is used last, and stays longest
            hint = key[:_HINT_BYTES]
            self._hints[hint] = None
            self._hints.move_to_end(hint)
        return self._trim()

    def _trim(self) -> int:
        surplus = max(len(self._hints) - self._most, 0)
        for _ in range(surplus):
            self._hints.popitem(last=False)
        return surplus


class Rents:
    """What requests have paid for waiting where their prefix is, by the key of its last block.

    A payment counts for as long as a copy would have lasted: it fades while the pools are filled anew.
    """

    def __init__(self) -> None:
        self._paid: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        """Seconds, and the turnover when they were counted."""
        self._turnover = 0.0
        """How often all pools together have forgotten as many blocks as they hold."""

    def paid_s(self, prefix: BlockKey) -> float:
        """Since it was last computed somewhere."""
        paid_s, then = self._paid.get(prefix[:_HINT_BYTES], (0.0, 0.0))
        return paid_s * math.exp(then - self._turnover)

    def pay(self, prefix: BlockKey, seconds: float) -> None:
        """One request has waited so long."""
        paid_s = self.paid_s(prefix) + seconds
        self.bought(prefix)
        self._paid[prefix[:_HINT_BYTES]] = paid_s, self._turnover
        if len(self._paid) > _MOST_RENTS:
            self._paid.popitem(last=False)

    def bought(self, prefix: BlockKey) -> None:
        """One more replica has it."""
        self._paid.pop(prefix[:_HINT_BYTES], None)

    def turned(self, share: float) -> None:
        """Pools have forgotten this share of what they hold."""
        self._turnover += share
