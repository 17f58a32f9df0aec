"""Work on texts beside the event loop: bounded in threads and bytes, short texts before long ones.

Knows no tokenizer. A caller that is cancelled, for instance because its deadline has passed, gives up its
turn; work that has begun is asked to stop.
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
"""More would hold up everyone else's tokens on the event loop."""
_SHORT_BYTES = 1 << 16
"""Texts of up to this size have a thread of their own: no long text is ever before them."""
_BYTES_PER_S = 1_000_000
"""About what tokenizers do: a text waits until it is its turn and its size's worth of time later."""

T = TypeVar("T")
Work = Callable[[Callable[[], bool]], T]
"""Asks now and then whether to stop, because nobody waits for its result."""


class Tokenizing:
    """One for each gateway; called on its event loop."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        """`max_bytes`: of texts that wait or are worked on; more are refused."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._short, self._long = _Lane(), _Lane()

    async def run(self, size_bytes: int, work: Work[T]) -> T:
        """The result of `work`, about a text of this size. Raises QueueFull, and what `work` raises."""
        if size_bytes <= _INLINE_BYTES:
            return work(lambda: False)
        if self._bytes + size_bytes > self._max_bytes:
            raise QueueFull(
                f"{self._bytes} bytes of text wait to be tokenized on this gateway, and "
                f"gateway.max_tokenizing_bytes={self._max_bytes} leaves no room for {size_bytes} more; "
                "try again later"
            )
        self._bytes += size_bytes
        try:
            return await (self._short if size_bytes <= _SHORT_BYTES else self._long).run(size_bytes, work)
        finally:
            self._bytes -= size_bytes


class _Lane:
    """One thread. Of those that wait, the one goes next whose arrival plus time of work comes first."""

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
            if not turn.cancelled():  # it was told that it is its turn in the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False
