"""A gateway's stream to a replica that says nothing any more."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from multiprocessing import get_context

import pytest
from serving import SECRET, replica_process

from quire.cluster.gateway.links import ReplicaLink
from quire.cluster.gateway.prompts import Tokenizers
from quire.protos.quire.v1 import engine_pb2
from quire.replicas.errors import Status


@asynccontextmanager
async def linked():
    """A link, and the process at its other end."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=replica_process, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    heard = asyncio.Event()
    link = await ReplicaLink.connect(ours.recv(), SECRET, 10.0, Tokenizers(), lambda *_: heard.set())
    await asyncio.wait_for(heard.wait(), 10)
    try:
        yield link, process
    finally:
        await link.close()
        process.kill()
        process.join()


async def test_calls_on_a_replica_whose_machine_went_silent_fail_within_seconds():
    """As when a cable is cut: the connection stays, and nothing comes."""
    async with linked() as (link, process):
        os.kill(process.pid, signal.SIGSTOP)
        call = link.submit(engine_pb2.Submit(token_ids=[1]))
        event = await asyncio.wait_for(call.next(), 10)
        assert event.failure.status == Status.UNAVAILABLE
        assert not link.alive


@pytest.mark.parametrize("seconds", [1, 9])
async def test_a_replica_that_is_stopped_for_a_moment_or_idle_for_long_keeps_its_link(seconds):
    async with linked() as (link, process):
        if seconds == 1:
            os.kill(process.pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(process.pid, signal.SIGCONT)
        assert (await link.stats()).pages_total == 7
        assert link.alive
