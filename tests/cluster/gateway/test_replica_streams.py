"""Which replicas a gateway is connected to, and where requests go."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from serving import SECRET, TOKENIZER, InTurn, Listed, ScriptedEngine, connected, open_requests

from quire.cluster.gateway.replica_streams import NoReplicaReady, ReplicaStreams
from quire.replicas.engine import service
from quire.replicas.errors import ConfigError


@asynccontextmanager
async def streams_to(names, *, tokenizers=(), wait_s=30.0, reconnect_s=0.2):
    """Streams to replicas that are listed, what lists them, and their services by name."""
    async with AsyncExitStack() as stack:
        replicas, services = {}, {}
        for at, name in enumerate(names):
            tokenizer = tokenizers[at] if tokenizers else TOKENIZER
            services[name] = service.EngineService(
                ScriptedEngine(), secret=SECRET, replica_id=name, tokenizer=tokenizer
            )
            server, replicas[name] = await service.listen(services[name], "127.0.0.1")
            stack.push_async_callback(server.stop, None)
        source = Listed(replicas)
        streams = ReplicaStreams(
            source, secret=SECRET, wait_s=wait_s, table=InTurn(), reconnect_s=reconnect_s
        )
        stack.push_async_callback(streams.close)
        yield streams, source, services


async def taken_by(streams, requests):
    """Who takes this many requests, one after the other."""
    takers = set()
    for _ in range(requests):
        async with streams.take() as (stream, _):
            takers.add(stream.replica_id)
    return takers


async def until(holds):
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.005)


async def test_all_that_are_listed_are_connected_and_take_requests():
    async with streams_to("abc") as (streams, _, _):
        await connected(streams, 3)
        assert await taken_by(streams, 3) == {"a", "b", "c"}


async def test_a_request_counts_at_its_replica_until_it_is_over():
    async with streams_to("a") as (streams, _, _):
        async with streams.take():
            assert open_requests(streams) == {"a": 1}
        assert open_requests(streams) == {"a": 0}


async def test_one_that_failed_as_dead_is_passed_over_until_it_is_connected_again():
    async with streams_to("ab", reconnect_s=1.0) as (streams, _, _):
        await connected(streams, 2)
        async with streams.take() as (stream, _):
            lost = stream.replica_id
            await stream.report_dead()
        (other,) = {"a", "b"} - {lost}
        assert await taken_by(streams, 3) == {other}
        await connected(streams, 2)
        assert await taken_by(streams, 2) == {"a", "b"}


async def test_a_request_waits_rather_than_go_to_one_that_failed_as_dead():
    async with streams_to("a") as (streams, source, _):
        async with streams.take() as (stream, _):
            await stream.report_dead()
        assert source.waits == 0
        request = asyncio.ensure_future(taken_by(streams, 1))
        await until(lambda: source.waits == 1)
        assert await request == {"a"}
        assert source.waits == 0


async def test_one_that_is_not_listed_any_more_takes_nothing_and_keeps_its_stream():
    async with streams_to("ab") as (streams, source, _):
        await connected(streams, 2)
        source.now({"b": source.replicas["b"]})
        assert await taken_by(streams, 3) == {"b"}
        assert len(await streams.stats()) == 2


async def test_one_that_drains_takes_nothing_and_its_open_requests_go_on():
    async with streams_to("ab") as (streams, _, services):
        await connected(streams, 2)
        async with streams.take() as (stream, _):
            leaver = stream.replica_id
            draining = asyncio.create_task(services[leaver].drain())
            await until(lambda: stream.draining)
            assert leaver not in await taken_by(streams, 3)
            await stream.report_dead()  # a request that it refuses says nothing of the others
            assert stream.alive
        await draining


async def test_the_one_that_was_connected_last_is_asked_what_is_served():
    async with streams_to("ab") as (streams, source, _):
        source.now({"a": source.replicas["a"]})
        assert (await streams.any_replica()).replica_id == "a"
        source.now(source.replicas)
        await connected(streams, 2)
        assert (await streams.any_replica()).replica_id == "b"


async def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing_behind():
    async with streams_to("") as (streams, source, _):
        before = asyncio.all_tasks()
        waiting = asyncio.create_task(taken_by(streams, 1))
        await until(lambda: source.waits == 1)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert (waiting.cancelled(), source.waits) == (True, 0)
        assert asyncio.all_tasks() - before == set()


LARGE = TOKENIZER | {"trainer_state.json": b" " * (65 << 20)}


async def test_a_replica_that_no_gateway_can_read_is_named_at_once():
    async with streams_to("a", tokenizers=[LARGE]) as (streams, _, _):
        with pytest.raises(ConfigError, match=r"too large for one message: .*larger than max"):
            await taken_by(streams, 1)


async def test_a_replica_that_no_gateway_can_read_costs_nothing_while_there_are_others():
    async with streams_to("ab", tokenizers=[TOKENIZER, LARGE]) as (streams, _, _):
        await connected(streams, 1)
        assert await taken_by(streams, 6) == {"a"}


async def test_who_waited_in_vain_hears_why():
    async with streams_to("a", wait_s=1.0) as (streams, source, _):
        source.now({"b": "127.0.0.1:1"})
        await until(lambda: streams._connect_error)
        with pytest.raises(
            NoReplicaReady, match=r"within 1 s: the replica at 127\.0\.0\.1:1 does not answer"
        ):
            await taken_by(streams, 1)


async def test_without_any_replica_the_error_says_so():
    async with streams_to("", wait_s=0.2) as (streams, _, _):
        with pytest.raises(NoReplicaReady, match=r"within 0\.2 s: none is up"):
            await taken_by(streams, 1)


async def test_another_replica_at_the_address_of_one_that_is_gone_is_not_taken_for_it():
    async with streams_to("a", wait_s=1.0) as (streams, source, _):
        source.now({"gone": source.replicas["a"]})
        await until(lambda: streams._connect_error)
        with pytest.raises(NoReplicaReady, match="another one answers"):
            await taken_by(streams, 1)
