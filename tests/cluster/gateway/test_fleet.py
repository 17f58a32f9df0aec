"""Which replicas a gateway goes by."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from serving import SECRET, TOKENIZER, Listed, ScriptedEngine

from quire.cluster.gateway.fleet import Fleet, NoReplicaReady, ReplicaAddress
from quire.cluster.routing.book import Routes
from quire.replicas.engine import service
from quire.replicas.errors import ConfigError


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


class Silent(Listed):
    """A machine that was cut off: nobody says that a place there was given back, until `answers`."""

    def __init__(self, replicas):
        super().__init__(replicas)
        self.answers = asyncio.Event()

    @asynccontextmanager
    async def choose(self, route):
        async with super().choose(route) as chosen:
            try:
                yield chosen
            finally:
                await self.answers.wait()


class Stuck(Listed):
    """As Serve does with a machine that was cut off: who asks it for a place waits until `answers`.

    So does what is left of a request that was cancelled meanwhile; then it is ranked once more.
    """

    def __init__(self, replicas):
        super().__init__(replicas)
        self.cut = None
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.waiting = []

    @asynccontextmanager
    async def choose(self, route):
        best = self._rank(route)[0]
        if best == self.cut:
            self.waiting.append(asyncio.create_task(self._wait(route)))
            self.asked.set()
            await asyncio.shield(self.waiting[-1])
        self.held += 1
        yield next(replica for replica in self.replicas if replica.replica_id == best)
        self.held -= 1

    async def _wait(self, route):
        await self.answers.wait()
        self._rank(route)

    def _rank(self, route):
        return route.rank({replica.replica_id: replica.address for replica in self.replicas})


@asynccontextmanager
async def fleet_of(names, clock, chooser=Listed, *, tokenizers=(), wait_s=10):
    async with AsyncExitStack() as stack:
        replicas = []
        for at, name in enumerate(names):
            tokenizer = tokenizers[at] if tokenizers else TOKENIZER
            served = service.EngineService(
                ScriptedEngine(), secret=SECRET, replica_id=name, tokenizer=tokenizer
            )
            server, address = await service.listen(served, "127.0.0.1")
            stack.push_async_callback(server.stop, None)
            replicas.append(ReplicaAddress(name, address))
        fleet = Fleet(chooser(replicas), secret=SECRET, wait_s=wait_s, routes=Routes(clock=clock))
        stack.push_async_callback(fleet.close)
        yield fleet


async def taken_by(fleet, requests):
    """Who takes so many requests, one after the other."""
    takers = set()
    for _ in range(requests):
        async with fleet.reserve() as place:
            takers.add(place.link.replica_id)
    return takers


async def test_one_that_failed_as_dead_is_passed_over_for_a_while():
    clock = Clock()
    async with fleet_of("ab", clock) as fleet:
        assert await taken_by(fleet, 2) == {"a", "b"}
        async with fleet.reserve() as place:
            await fleet.report_lost(place.link)
            lost = place.link.replica_id
        (other,) = {"a", "b"} - {lost}
        assert await taken_by(fleet, 3) == {other}
        clock.now_s += 6
        assert await taken_by(fleet, 2) == {"a", "b"}


async def test_a_request_waits_rather_than_go_to_one_that_failed_as_dead():
    clock = Clock()
    async with fleet_of("a", clock) as fleet:
        async with fleet.reserve() as place:
            await fleet.report_lost(place.link)
        request = asyncio.ensure_future(taken_by(fleet, 1))
        await asyncio.sleep(0.3)
        assert not request.done()
        clock.now_s += 6
        assert await request == {"a"}


async def test_a_place_that_nobody_takes_back_does_not_keep_its_request():
    async with fleet_of("ab", Clock(), Silent) as fleet, asyncio.timeout(5):
        assert await taken_by(fleet, 2) == {"a", "b"}
        await asyncio.sleep(0)
        assert fleet._chooser.held == 2
        fleet._chooser.answers.set()
        await asyncio.sleep(0.01)
        assert fleet._chooser.held == 0


@pytest.mark.parametrize("reported", [True, False])
async def test_a_request_that_waits_for_a_place_goes_elsewhere_when_the_replica_is_lost(reported):
    async with fleet_of("ab", Clock(), Stuck) as fleet, asyncio.timeout(5):
        async with fleet.reserve() as place:
            lost, link = place.link.replica_id, place.link
        fleet._chooser.cut = lost
        waiting = [asyncio.ensure_future(taken_by(fleet, 1)) for _ in range(4)]
        await fleet._chooser.asked.wait()
        await (fleet.report_lost(link) if reported else link.close())
        assert await asyncio.gather(*waiting) == [{"a", "b"} - {lost}] * 4


async def test_what_serve_does_with_a_request_that_was_given_up_does_not_count():
    async with fleet_of("ab", Clock(), Stuck) as fleet, asyncio.timeout(5):
        async with fleet.reserve() as place:
            fleet._chooser.cut = place.link.replica_id
            link = place.link
        done = asyncio.Event()
        serving = [asyncio.create_task(held(fleet, done)) for _ in range(2)]  # one at each
        await fleet._chooser.asked.wait()
        await link.close()
        while fleet._chooser.held < 2:
            await asyncio.sleep(0.01)
        fleet._chooser.answers.set()
        await asyncio.gather(*fleet._chooser.waiting)
        done.set()
        assert link.replica_id not in {decision.replica_id for decision in await asyncio.gather(*serving)}
        assert open_requests(fleet) == {"a": 0, "b": 0}


async def test_a_request_stays_where_it_waits_if_nobody_else_is_there():
    async with fleet_of("a", Clock(), Stuck) as fleet, asyncio.timeout(5):
        async with fleet.reserve() as place:
            link = place.link
        fleet._chooser.cut = "a"
        waiting = asyncio.create_task(taken_by(fleet, 1))
        await fleet._chooser.asked.wait()
        await link.close()
        await asyncio.sleep(0.6)  # two looks
        assert len(fleet._chooser.waiting) == 1
        waiting.cancel()


async def test_a_request_that_is_cancelled_while_it_waits_for_a_place_leaves_nothing_behind():
    async with fleet_of("a", Clock(), Stuck) as fleet, asyncio.timeout(5):
        fleet._chooser.cut, before = "a", asyncio.all_tasks()
        waiting = asyncio.create_task(taken_by(fleet, 1))
        await fleet._chooser.asked.wait()
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        fleet._chooser.answers.set()
        await asyncio.wait(fleet._chooser.waiting)
        await asyncio.sleep(0)
        assert (open_requests(fleet), asyncio.all_tasks() - before) == ({"a": 0}, set())


async def held(fleet, done):
    """Where a request went that keeps its place until `done`."""
    async with fleet.reserve() as place:
        await done.wait()
        return place.route.decision


def open_requests(fleet):
    """By replica, as the gateway's books have it."""
    return {name: len(known.open) for name, known in fleet.routes._replicas.items()}


LARGE = TOKENIZER | {"trainer_state.json": b" " * (65 << 20)}


async def test_a_replica_that_no_gateway_can_read_is_named_at_once():
    async with fleet_of("a", Clock(), tokenizers=[LARGE]) as fleet, asyncio.timeout(5):
        with pytest.raises(ConfigError, match=r"too large for one message: .*larger than max"):
            await taken_by(fleet, 1)


async def test_a_replica_that_no_gateway_can_read_costs_nothing_while_there_are_others():
    async with fleet_of("ab", Clock(), tokenizers=[TOKENIZER, LARGE]) as fleet, asyncio.timeout(20):
        fleet._chooser.replicas.reverse()  # "a" is met first
        assert await taken_by(fleet, 6) == {"a"}


async def test_who_waited_in_vain_hears_why():
    async with fleet_of("a", Clock(), wait_s=0.5) as fleet:
        (replica,) = fleet._chooser.replicas
        fleet._chooser.replicas = [ReplicaAddress("b", "127.0.0.1:1")]
        with pytest.raises(
            NoReplicaReady, match=r"within 0\.5 s: the replica at 127\.0\.0\.1:1 does not answer"
        ):
            await taken_by(fleet, 1)
        fleet._chooser.replicas = []
        with pytest.raises(NoReplicaReady, match=r"within 0\.5 s: none is up"):
            await taken_by(fleet, 1)
        fleet._chooser.replicas = [replica]
        assert await taken_by(fleet, 1) == {"a"}
