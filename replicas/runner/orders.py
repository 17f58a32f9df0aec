"""An order's way to all ranks of a replica, and their reports' way back to rank 0.

Orders come over the group, between steps. Reports do not go back that way: in the group every rank takes part
in everything, so that a report would have to wait for a step, or steps for it. They go into a queue in the
replica's key-value store, at which rank 0 looks while it waits for any. A dead rank's never come: then the
replica is dead, too.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch.distributed import Store

from quire.kvstore.peers.messages import Moved, Order, from_bytes, to_bytes

_QUEUE = "moved"
_LOOK_S = 0.002
"""Between two looks at the queue, which cost some 50 µs each."""


@dataclass(frozen=True, slots=True)
class NumberedOrder:
    """An order under a number that rank 0 gave it: a transfer's own is its receiver's alone."""

    number: int
    order: Order
    since_s: float = field(default_factory=time.monotonic)

    def left(self) -> Order:
        """The order with what is left of its time: it may have waited for a step."""
        waited_s = time.monotonic() - self.since_s
        return replace(self.order, timeout_s=max(self.order.timeout_s - waited_s, 0.0))

    def to_bytes(self) -> bytes:
        return _numbered(self.number, to_bytes(self.left()))

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> NumberedOrder:
        return NumberedOrder(*_split(data))


def leave_report(store: Store, number: int, moved: Moved) -> None:
    """From any rank but 0, of its part of the order `number`. In any thread."""
    with suppress(RuntimeError):  # rank 0 is gone, and with it whoever waits
        store.queue_push(_QUEUE, _numbered(number, to_bytes(moved)))


@dataclass(slots=True)
class _Due:
    report: Callable[[Moved], None]
    ranks: int
    """That have not reported."""


class Reports:
    """Rank 0's end: who waits for what. Its thread rests while nothing is due."""

    def __init__(self, store: Store, ranks: int) -> None:
        """`ranks`: how many report on every order, rank 0 among them."""
        self._store, self._ranks = store, ranks
        self._numbers = itertools.count()
        self._due: dict[int, _Due] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="quire-reports", daemon=True)
        self._thread.start()

    def expect(self, report: Callable[[Moved], None]) -> int:
        """Have `report` called once for each rank, for the order that goes out under this number."""
        with self._changed:
            number = next(self._numbers)
            self._due[number] = _Due(report, self._ranks)
            self._changed.notify()
        return number

    def deliver(self, number: int, moved: Moved) -> None:
        """Rank 0's own reports are brought here."""
        with self._changed:
            due = self._due[number]
            due.ranks -= 1
            if due.ranks == 0:
                del self._due[number]
        due.report(moved)

    def close(self) -> None:
        """No other rank is heard any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            while self._store.queue_len(_QUEUE):
                self.deliver(*_split(self._store.queue_pop(_QUEUE)))
            time.sleep(_LOOK_S)

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._due or self._closed)
            return not self._closed


def _numbered(number: int, value: bytes) -> bytes:
    return number.to_bytes(8, "little") + value


def _split(data: bytes | memoryview) -> tuple[int, Any]:
    return int.from_bytes(data[:8], "little"), from_bytes(bytes(data[8:]))
