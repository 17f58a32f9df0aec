"""How a gateway is called: on an event loop, or blocking the thread.

The client is written once, as coroutines over `Calls`. Over blocking calls a coroutine never suspends, so its
first step is its last, and no event loop is needed to run it. A thread with an event loop would do as well,
but the client would then have to care about forks, interrupts and the loops of its callers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from typing import Any, TypeVar

import grpc

T = TypeVar("T")
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # a long prompt's logprobs are one message
    ("grpc.keepalive_time_ms", 10_000),  # a gateway whose machine is gone sends no FIN
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # however long an answer is quiet
    ("grpc.initial_reconnect_backoff_ms", 200),  # a replaced gateway is back soon
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class Calls:
    """Calls of grpc.aio, for the event loop that the client is made in."""

    def channel(self, address: str) -> Any:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)

    async def result(self, call: Any) -> Any:
        return await call

    def items(self, call: Any) -> AsyncIterator[Any]:
        return aiter(call)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class BlockingCalls(Calls):
    """Calls of grpc's blocking API, whose results are there once a call returns."""

    def channel(self, address: str) -> Any:
        return grpc.insecure_channel(address, options=_OPTIONS)

    async def result(self, call: Any) -> Any:
        return call

    async def items(self, call: Any) -> AsyncIterator[Any]:
        for item in call:
            yield item

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def run(work: Awaitable[T]) -> T:
    """Run a coroutine over `BlockingCalls` to its end, in this thread, and return its result."""
    try:
        next(work.__await__())
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a coroutine over blocking calls suspended itself")


def iterate(stream: AsyncGenerator[T, None]) -> Iterator[T]:
    """Iterate over a stream that is read with `BlockingCalls`; dropping the iterator closes the stream."""
    try:
        while True:
            try:
                yield run(anext(stream))
            except StopAsyncIteration:
                return
    finally:
        run(stream.aclose())
