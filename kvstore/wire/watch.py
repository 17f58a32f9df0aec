"""Calls what is due at its time, from one thread: deadlines that hold whatever other threads hang in."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class Watch:
    """Keeps times and calls; a call must not wait for anything that may hang for more than a moment."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name="quire-watch", daemon=True).start()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time_s, next(self._count), call))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while (call := self._wait()) is not None:
            call()

    def _wait(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                wait_s = self._due[0][0] - time.monotonic() if self._due else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait_s)
        return None
