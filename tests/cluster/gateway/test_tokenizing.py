"""Work on texts beside the event loop: bounded, short texts before long ones, none for those who left."""

import asyncio
import threading

import pytest

from quire.cluster.gateway.tokenizing import Tokenizing
from quire.replicas.errors import QueueFull

SHORT, LONG = 10_000, 10_000_000


class _Held:
    """Work that goes on until it is let go, or told to stop."""

    def __init__(self):
        self.begun, self.stopped, self._go = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, stopped):
        self.begun.set()
        while not self._go.wait(0.005):
            if stopped():
                self.stopped.set()
                return "stopped"
        return "done"

    def let_go(self):
        self._go.set()


async def _until(event):
    assert await asyncio.to_thread(event.wait, 10)


async def test_a_long_text_does_not_hold_up_short_ones():
    tokenizing, long = Tokenizing(), _Held()
    working = asyncio.create_task(tokenizing.run(LONG, long))
    await _until(long.begun)
    assert await tokenizing.run(SHORT, lambda stopped: "short") == "short"
    assert await tokenizing.run(10, lambda stopped: threading.current_thread()) is threading.current_thread()
    long.let_go()
    assert await working == "done"


async def test_of_those_who_wait_the_shorter_goes_first_if_it_came_soon_enough():
    tokenizing, first, order = Tokenizing(), _Held(), []
    working = asyncio.create_task(tokenizing.run(LONG, first))
    await _until(first.begun)
    sizes = [9_000_000, 200_000, 5_000_000, 200_000]
    tasks = []
    for number, size in enumerate(sizes):
        tasks.append(asyncio.create_task(tokenizing.run(size, lambda stopped, n=number: order.append(n))))
        await asyncio.sleep(0)
    first.let_go()
    await asyncio.gather(working, *tasks)
    assert order == [1, 3, 2, 0]


async def test_more_bytes_than_may_wait_are_refused():
    tokenizing, held = Tokenizing(max_bytes=LONG + SHORT), _Held()
    working = asyncio.create_task(tokenizing.run(LONG, held))
    await _until(held.begun)
    with pytest.raises(QueueFull, match=r"gateway\.max_tokenizing_bytes=10010000"):
        await tokenizing.run(SHORT + 1, lambda stopped: None)
    assert await tokenizing.run(SHORT, lambda stopped: "fits") == "fits"
    held.let_go()
    await working
    assert await tokenizing.run(LONG, lambda stopped: "fits again") == "fits again"


async def test_who_leaves_before_its_turn_costs_nothing_and_after_it_is_stopped():
    tokenizing, first, second = Tokenizing(max_bytes=3 * LONG), _Held(), _Held()
    working = asyncio.create_task(tokenizing.run(LONG, first))
    await _until(first.begun)
    waiting = asyncio.create_task(tokenizing.run(LONG, second))
    behind = asyncio.create_task(tokenizing.run(LONG, lambda stopped: "behind"))
    await asyncio.sleep(0)
    waiting.cancel()
    working.cancel()
    await _until(first.stopped)
    assert await behind == "behind"
    assert not second.begun.is_set()
    await asyncio.gather(working, waiting, return_exceptions=True)
    assert await tokenizing.run(3 * LONG, lambda stopped: "all of it is free") == "all of it is free"


async def test_what_the_work_raises_is_raised_and_the_next_one_goes_on():
    def fails(stopped):
        raise ValueError("so it is")

    tokenizing = Tokenizing()
    with pytest.raises(ValueError, match="so it is"):
        await tokenizing.run(LONG, fails)
    assert await tokenizing.run(LONG, lambda stopped: "next") == "next"
