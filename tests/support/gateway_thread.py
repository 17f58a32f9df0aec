"""A gateway in another thread, for what blocks: its engine answers as a test says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving import ScriptedEngine, staged

from quire.replicas.request import Request


@contextmanager
def gateway_thread(answer: Callable[[ScriptedEngine, Request], None]) -> Iterator[str]:
    """Serve `answer(engine, request)` to every request; give the gateway's address."""
    address: list[str] = []
    up = threading.Event()
    stopping: list[Callable[[], object]] = []

    async def main() -> None:
        engine, stop = ScriptedEngine(), asyncio.Event()
        loop = asyncio.get_running_loop()
        stopping.append(lambda: loop.call_soon_threadsafe(stop.set))
        async with staged(engine, wait_s=60.0) as stage:
            address.append(stage.address)
            up.set()
            answering = asyncio.create_task(_answer_all(engine, answer))
            await stop.wait()
            answering.cancel()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert up.wait(60)
        yield address[0]
    finally:
        stopping[0]()
        thread.join(60)


async def _answer_all(engine: ScriptedEngine, answer: Callable[[ScriptedEngine, Request], None]) -> None:
    while True:
        answer(engine, await engine.requests.get())
