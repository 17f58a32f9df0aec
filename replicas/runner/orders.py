"""Shards' reports of the orders they carried out, on their way to rank 0.

Orders go out over the replica's group, because their place among the steps matters. Reports have none, and in
the group every rank takes part in everything, so that a report would wait for a step, or steps for it. They
go into a queue in the replica's key-value store, at which rank 0 waits. Reports of a rank that died never
come: then the replica is dead, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec
from torch.distributed import DistStoreError, Store, TCPStore

from quire.kvstore.peers.messages import Moved
from quire.kvstore.wire.groups import join_store

_QUEUE = "moved"
_END = b"end"
_WAIT_S = 3600.0
_DECODER = msgspec.msgpack.Decoder(tuple[int, Moved])


def leave_report(store: Store, number: int, moved: Moved) -> None:
    """Report this rank's part of order `number`; for any rank but 0, from any thread."""
    with suppress(RuntimeError):  # rank 0 is gone, and with it all that waits
        store.queue_push(_QUEUE, msgspec.msgpack.encode((number, moved)))


class Reports:
    """Rank 0's end: calls back with the reports of every rank."""

    def __init__(self, store: TCPStore, ranks: int) -> None:
        """`store`: rank 0's. `ranks`: how many report on every order, rank 0 among them."""
        self._store, self._ranks = store, ranks
        self._queue = join_store(store.host, store.port, _WAIT_S)  # a connection that may wait
        self._last = 0
        self._due: dict[int, tuple[Callable[[Moved], None], int]] = {}
        """By the order's number: whom to call, and how many ranks have yet to report."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="quire-reports", daemon=True)
        self._thread.start()

    def expect(self, report: Callable[[Moved], None]) -> int:
        """Have `report` called once for each rank, for the order that goes out under the returned number."""
        with self._lock:
            self._last += 1
            self._due[self._last] = report, self._ranks
            return self._last

    def deliver(self, number: int, moved: Moved) -> None:
        """Take in a report; rank 0's own are brought here, too."""
        with self._lock:
            report, ranks = self._due.pop(number)
            if ranks > 1:
                self._due[number] = report, ranks - 1
        report(moved)

    def close(self) -> None:
        """Stop taking in other ranks' reports."""
        self._store.queue_push(_QUEUE, _END)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                data = self._queue.queue_pop(_QUEUE)
            except DistStoreError:  # nothing has come for as long as the store waits
                continue
            if data == _END:
                return
            self.deliver(*_DECODER.decode(data))
