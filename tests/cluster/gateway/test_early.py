"""Requests that are sent before their place is sure."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from serving import Listed, ScriptedEngine, staged

from quire.cluster import CallOptions, collect_async
from quire.cluster.routing.book import Routes
from quire.cluster.routing.score import Candidate
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.request import FinishReason, Output, Usage

PROMPT = [5, 6, 7]


class Slow(Listed):
    """Ranks as Serve does, on another thread; then a place takes until `sure` is set. It is at the best one,
    or at `elsewhere`.
    """

    def __init__(self, replicas):
        super().__init__(replicas)
        self.sure = asyncio.Event()
        self.sure.set()
        self.rankings = 1
        self.elsewhere = None
        self.best = ""
        self.cancelling = asyncio.Event()
        self.cancelling.set()

    @asynccontextmanager
    async def choose(self, route):
        for _ in range(self.rankings):
            addresses = {replica.replica_id: replica.address for replica in self.replicas}
            self.best, *_ = await asyncio.to_thread(route.rank, addresses)
        try:
            await self.sure.wait()
        except asyncio.CancelledError:
            await self.cancelling.wait()
            raise
        name = self.elsewhere or self.best
        self.held += 1
        try:
            yield next(replica for replica in self.replicas if replica.replica_id == name)
        finally:
            self.held -= 1


@asynccontextmanager
async def meeting(*engines, load=LoadReport(pages_total=7, max_running=4)):  # noqa: B008, a value
    """The gateway knows all replicas, and what they say of their load; places are not sure any more."""
    for engine in engines:
        engine.load = load
    async with staged(*engines, chooser_of=Slow) as stage, asyncio.timeout(10):
        chooser = stage.chooser
        for name in (replica.replica_id for replica in chooser.replicas):
            chooser.elsewhere = name
            greeter = asyncio.create_task(greet(engines[int(name[-1])]))
            await collect_async(stage.client.generate(PROMPT))
            greeter.cancel()
        for engine in engines:  # what was sent to the best one first
            while not engine.requests.empty():
                engine.requests.get_nowait()
            while not engine.cancelled.empty():
                engine.cancelled.get_nowait()
        chooser.elsewhere = None
        chooser.sure.clear()
        yield stage


async def greet(engine):
    """Answers whatever comes, what was sent there too early before as well."""
    while True:
        engine.say(await engine.requests.get(), "hello", 1, last=True)


async def sent_first(engines):
    """Which of two engines a request is sent to, the request, and what will be the other's."""
    asked = [asyncio.ensure_future(engine.requests.get()) for engine in engines]
    (sent,), _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    best = asked.index(sent)
    return best, sent.result(), asked[1 - best]


async def test_a_request_is_computed_while_its_place_is_asked_for_and_answered_once_it_is_sure():
    engine = ScriptedEngine()
    async with meeting(engine) as stage:
        stream = stage.client.generate(PROMPT)
        first = asyncio.ensure_future(anext(stream))
        request = await engine.requests.get()
        engine.say(request, "a", 10)
        await asyncio.sleep(0.1)
        assert (first.done(), stage.chooser.held) == (False, 0)
        stage.chooser.sure.set()
        assert ((await first).text, stage.chooser.held) == ("a", 1)
        engine.say(request, "b", 11, last=True)
        assert [delta.text async for delta in stream] == ["b"]
        assert (engine.requests.qsize(), engine.cancelled.qsize()) == (0, 0)


async def test_one_whose_place_is_elsewhere_is_taken_back_and_answered_there():
    engines = ScriptedEngine(), ScriptedEngine()
    async with meeting(*engines) as stage:
        answer = asyncio.create_task(collect_async(stage.client.generate(PROMPT)))
        best, request, other = await sent_first(engines)
        engines[best].say(request, "wrong", 9)
        stage.chooser.elsewhere = f"replica{1 - best}"
        stage.chooser.sure.set()
        assert await engines[best].cancelled.get() == request.id
        engines[1 - best].say(await other, "right", 10, last=True)
        assert (await answer).text == "right"


@pytest.mark.parametrize(
    "load", [LoadReport(pages_total=7, max_running=4, running=3, waiting=1), LoadReport(pages_total=7)]
)
async def test_a_request_waits_for_its_place_where_the_replica_is_full(load):
    engine = ScriptedEngine()
    async with meeting(engine, load=load) as stage:
        answer = asyncio.create_task(collect_async(stage.client.generate(PROMPT)))
        await asyncio.sleep(0.1)
        assert engine.requests.empty()
        stage.chooser.sure.set()
        engine.say(await engine.requests.get(), "a", 10, last=True)
        assert (await answer).text == "a"


async def test_a_request_that_serve_ranks_twice_is_sent_once():
    engine = ScriptedEngine()
    async with meeting(engine) as stage:
        stage.chooser.rankings = 2
        answer = asyncio.create_task(collect_async(stage.client.generate(PROMPT)))
        request = await engine.requests.get()
        stage.chooser.sure.set()
        engine.say(request, "a", 10, last=True)
        assert (await answer).text == "a"
        assert (engine.requests.qsize(), engine.cancelled.qsize()) == (0, 0)


async def test_a_request_follows_where_serve_ranks_it(monkeypatch):
    """First at one, then at the other, then the place is at the first again."""
    engines = ScriptedEngine(), ScriptedEngine()
    async with meeting(*engines) as stage:
        ranked = []

        def in_turn(_, route, replicas):
            ranked.append(order := sorted(replicas, reverse=len(ranked) % 2 == 1))
            route.candidates = {name: Candidate(replica_id=name) for name in order}
            route._routes._count_at(route, order[0])
            return tuple(order)

        monkeypatch.setattr(Routes, "rank", in_turn)
        monkeypatch.setattr(Candidate, "has_room", True)
        stage.chooser.rankings, stage.chooser.elsewhere = 2, "replica0"
        answer = asyncio.create_task(collect_async(stage.client.generate(PROMPT)))
        first = await engines[0].requests.get()
        assert await engines[0].cancelled.get() == first.id
        second = await engines[1].requests.get()
        stage.chooser.sure.set()
        assert await engines[1].cancelled.get() == second.id
        again = await engines[0].requests.get()
        engines[0].say(again, "a", 10, last=True)
        assert (await answer).text == "a"


async def test_one_that_is_cancelled_by_its_id_while_its_place_is_asked_for_ends_on_the_replica():
    engine = ScriptedEngine()
    async with meeting(engine) as stage:
        options = CallOptions(request_id="mine")
        answer = asyncio.create_task(collect_async(stage.client.generate(PROMPT, options=options)))
        request = await engine.requests.get()
        assert await stage.client.cancel("mine")
        assert await engine.cancelled.get() == request.id
        stage.chooser.sure.set()
        usage = Usage(prompt_tokens=3, cached_tokens=0, output_tokens=0)
        engine.send(Output(request_id=request.id, index=0, finish_reason=FinishReason.CANCELLED, usage=usage))
        assert not (await answer).text


async def test_a_client_that_leaves_before_the_place_is_sure_is_cancelled_on_the_replica():
    engine = ScriptedEngine()
    async with meeting(engine) as stage:
        answer = asyncio.create_task(collect_async(stage.client.generate(PROMPT)))
        request = await engine.requests.get()
        stage.chooser.cancelling.clear()  # Serve takes its time
        answer.cancel()
        assert await engine.cancelled.get() == request.id
        stage.chooser.cancelling.set()


async def test_one_that_dies_before_the_place_is_sure_leaves_the_request_to_another():
    engines = ScriptedEngine(), ScriptedEngine()
    async with meeting(*engines) as stage:
        answer = asyncio.create_task(collect_async(stage.client.generate(PROMPT)))
        best, _, other = await sent_first(engines)
        await stage.kill_replica(best)
        engines[1 - best].say(await other, "fine", 10, last=True)
        stage.chooser.sure.set()
        assert (await answer).text == "fine"
