"""What requests have paid for waiting where their prefix is: rent, until a copy of it is bought."""

from __future__ import annotations

import math
from collections import OrderedDict

from quire.kvstore.keys import BlockKey

_MOST = 4096


class Rents:
    """By the key of a prefix's last block; those that were paid for last.

    A payment counts for as long as a copy would have lasted: it fades while the pools are filled anew.
    """

    def __init__(self) -> None:
        self._paid: OrderedDict[BlockKey, tuple[float, float]] = OrderedDict()
        """Seconds, and the turnover when they were counted."""
        self._turnover = 0.0
        """How often all pools together have forgotten as many blocks as they hold."""

    def paid_s(self, prefix: BlockKey) -> float:
        """Since it was last computed somewhere."""
        paid_s, then = self._paid.get(prefix, (0.0, 0.0))
        return paid_s * math.exp(then - self._turnover)

    def pay(self, prefix: BlockKey, seconds: float) -> None:
        """One request has waited so long."""
        self._paid[prefix] = self.paid_s(prefix) + seconds, self._turnover
        self._paid.move_to_end(prefix)
        if len(self._paid) > _MOST:
            self._paid.popitem(last=False)

    def bought(self, prefix: BlockKey) -> None:
        """One more replica has it."""
        self._paid.pop(prefix, None)

    def turned(self, share: float) -> None:
        """Pools have forgotten this share of what they hold."""
        self._turnover += share
