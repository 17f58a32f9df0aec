"""Runs work on texts outside the event loop, bounded in threads and bytes, short texts before long ones.

Knows no tokenizer. A caller that is cancelled, for instance because its deadline has passed, leaves the
queue; work that has begun is told to stop.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from typing import TypeVar

from quire.replicas.errors import QueueFull

_INLINE_BYTES = 2_000
"""The largest text that is tokenized on the event loop; larger ones would delay other requests' tokens."""
_SHORT_BYTES = 1 << 16
"""Texts of up to this size have their own thread, so that they never wait for a long text."""
_BYTES_PER_S = 1_000_000
"""The assumed rate of tokenizers, by which texts are ordered."""

T = TypeVar("T")
Work = Callable[[Callable[[], bool]], T]
"""Work that checks now and then whether to stop, because its result is not needed any more."""


class Tokenizing:
    """A gateway's queue of texts; called on its event loop."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        """Bound the bytes of texts that wait or are worked on; more are refused."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._short, self._long = _Lane(), _Lane()

    async def run(self, size_bytes: int, work: Work[T]) -> T:
        """Return the result of `work` on a text of this size. Raises QueueFull, and what `work` raises."""
        if size_bytes <= _INLINE_BYTES:
            return work(lambda: False)
        if self._bytes + size_bytes > self._max_bytes:
            raise QueueFull(
                f"{self._bytes} bytes of text wait to be tokenized on this gateway, and "
                f"gateway.max_tokenizing_bytes={self._max_bytes} leaves no room for {size_bytes} more; "
                "retry later"
            )
        self._bytes += size_bytes
        try:
            return await (self._short if size_bytes <= _SHORT_BYTES else self._long).run(size_bytes, work)
        finally:
            self._bytes -= size_bytes


class _Lane:
    """One thread, which serves waiting texts by their arrival plus expected time of work."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-text")
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._busy = False

    async def run(self, size_bytes: int, work: Work[T]) -> T:
        await self._turn(size_bytes)
        stop = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, stop.is_set)
        finally:
            stop.set()
            self._pass_on()

    async def _turn(self, size_bytes: int) -> None:
        if not self._busy:
            self._busy = True
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        heappush(self._waiting, (loop.time() + size_bytes / _BYTES_PER_S, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came at the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False
