"""The whole application under Ray Serve: answers, and what becomes of requests when processes die."""

import asyncio
import signal
import time

import psutil
import pytest
from served_app import Served

from quire.cluster import AsyncClient, Client, SamplingParams, collect, collect_async
from quire.cluster.cli.demo import run_demo
from quire.replicas.errors import ReplicaDied

pytestmark = pytest.mark.ray

PROMPTS = [f"Long ago, a {who} named {name}" for who in ("cat", "fox", "hen", "owl") for name in "ABCD"]
SAMPLING = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="session")
def right_answers(served: Served) -> list[list[int]]:
    async def ask():
        async with AsyncClient(served.address) as client:
            return await asyncio.gather(*(collect_async(client.generate(p, SAMPLING)) for p in PROMPTS))

    return [answer.outputs[0].token_ids for answer in asyncio.run(ask())]


def test_the_demo_finds_its_facts_and_hits_the_cache(served: Served):
    lines: list[str] = []
    run_demo(served.address, lines.append, lines.append)
    text = "".join(lines)
    assert "71432" in text
    assert "8264" in text
    assert "bytes per token" in text


def test_both_shards_and_the_gateway_are_processes_of_their_own(served: Served):
    assert len(served.processes("ShardActor")) == 1  # rank 0 lives in the replica
    assert len(served.processes("Replica")) == 1
    assert len(served.processes("Gateway")) == 1


def test_the_gateway_listens_on_the_loopback_address_only(served: Served):
    (process,) = served.processes("Gateway")
    port = int(served.address.rsplit(":", 1)[1])
    at = {c.laddr.ip for c in process.net_connections("inet") if c.laddr.port == port and not c.raddr}
    assert at
    assert at <= {"127.0.0.1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize(
    ("victim", "blow"),
    [("ShardActor", signal.SIGKILL), ("ShardActor", signal.SIGSTOP), ("Replica", signal.SIGKILL)],
)
async def test_sixteen_requests_survive_or_say_so(served: Served, right_answers, victim, blow):
    """Each gets the right answer or UNAVAILABLE; the replica returns by itself and answers as before."""
    (process,) = served.processes(victim)
    async with AsyncClient(served.address) as client:
        streams = [client.generate(p, SAMPLING) for p in PROMPTS]
        started = await asyncio.gather(*(anext(s) for s in streams))
        process.send_signal(blow)
        results = await asyncio.gather(*(collect_async(s) for s in streams), return_exceptions=True)
        for first, rest, right in zip(started, results, right_answers, strict=True):
            if isinstance(rest, BaseException):
                assert isinstance(rest, ReplicaDied)
            else:
                assert [*first.token_ids, *rest.outputs[0].token_ids] == right
        again = await asyncio.gather(*(collect_async(client.generate(p, SAMPLING)) for p in PROMPTS))
        assert [answer.outputs[0].token_ids for answer in again] == right_answers
        (replica,) = (await client.stats()).replicas
        assert replica.pages_free + replica.pages_cached == replica.pages_total
    await _until(lambda: not _alive(process))


async def test_dropped_streams_give_every_page_back(served: Served):
    async with AsyncClient(served.address) as client:
        streams = [client.generate(p, SAMPLING) for p in PROMPTS]
        await asyncio.gather(*(anext(s) for s in streams))
        for stream in streams[::2]:
            await stream.aclose()
        await asyncio.gather(*(collect_async(s) for s in streams[1::2]))

        async def free():
            (replica,) = (await client.stats()).replicas
            return replica.pages_free + replica.pages_cached == replica.pages_total

        async with asyncio.timeout(60):
            while not await free():
                await asyncio.sleep(0.05)


def test_a_gateway_that_dies_returns_on_its_port(served: Served, right_answers):
    (gateway,) = served.processes("Gateway")
    with Client(served.address) as client:
        stream = client.generate(PROMPTS[0], SamplingParams(max_tokens=1000, ignore_eos=True))
        next(stream)
        gateway.kill()
        with pytest.raises(ReplicaDied):
            collect(stream)
    deadline = time.monotonic() + 180
    while True:
        with Client(served.address) as client:
            try:
                answer = collect(client.generate(PROMPTS[0], SAMPLING))
                break
            except ReplicaDied:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    assert answer.outputs[0].token_ids == right_answers[0]
    with Client(served.address) as client:
        (replica,) = client.stats().replicas
        assert replica.running == 0, "the dead gateway's request goes on"


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


async def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
