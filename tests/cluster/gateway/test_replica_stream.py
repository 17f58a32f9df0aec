"""A gateway's stream to a replica that says nothing any more."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest
from forkserver import forkserver
from serving import SECRET, replica_process

from quire.cluster.gateway.replica_stream import ReplicaStream
from quire.cluster.gateway.tokenizer import Tokenizers
from quire.cluster.routing.replica_table import ReplicaTable
from quire.protos.quire.v1 import engine_pb2
from quire.replicas.errors import Status


@asynccontextmanager
async def connected():
    """A stream, and the process at its other end."""
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(target=replica_process, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    stream = await ReplicaStream.connect("r", ours.recv(), SECRET, 10.0, Tokenizers(), ReplicaTable())
    await asyncio.wait_for(stream.stats(), 10)
    try:
        yield stream, process
    finally:
        await stream.close()
        process.kill()
        process.join()


async def test_calls_on_a_replica_whose_machine_went_silent_fail_within_seconds():
    """As when a cable is cut: the connection stays, and nothing comes."""
    async with connected() as (stream, process):
        os.kill(process.pid, signal.SIGSTOP)
        call = stream.submit(engine_pb2.Submit(token_ids=[1]))
        event = await asyncio.wait_for(call.next(), 60)
        assert event.failure.status == Status.UNAVAILABLE
        assert not stream.alive


@pytest.mark.parametrize("seconds", [1, 9])
async def test_a_replica_that_is_stopped_for_a_moment_or_idle_for_long_keeps_its_stream(seconds):
    async with connected() as (stream, process):
        if seconds == 1:
            os.kill(process.pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(process.pid, signal.SIGCONT)
        assert (await stream.stats()).pages_total == 7
        assert stream.alive
