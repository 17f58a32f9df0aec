"""Long prompts go to a prefill replica first; whatever happens there, the answer comes."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from serving import SECRET, TOKENIZER, InTurn, Listed, ScriptedEngine, connected

from quire.cluster.gateway.prefill import PrefillFirst
from quire.cluster.gateway.replica_streams import ReplicaStreams
from quire.protos.quire.v1 import engine_pb2, inference_pb2
from quire.replicas.engine import service
from quire.replicas.errors import QueueFull, QuireError, Status
from quire.replicas.request import Failure

LONG, SHORT = list(range(10, 30)), [5, 6]
ASKED = inference_pb2.Sampling(max_tokens=50, n=3, temperature=1.0, stop=["x"])


@asynccontextmanager
async def prefill_by(*engines):
    async with AsyncExitStack() as stack:
        replicas = {}
        for number, engine in enumerate(engines):
            served = service.EngineService(
                engine,
                secret=SECRET,
                replica_id=f"r{number}",
                tokenizer=TOKENIZER,
                peer_id=f"peer{number}",
            )
            server, address = await service.listen(served, "127.0.0.1")
            stack.push_async_callback(server.stop, None)
            replicas[f"r{number}"] = address
        streams = ReplicaStreams(Listed(replicas), secret=SECRET, wait_s=0.5, table=InTurn())
        first = PrefillFirst(streams, least_tokens=len(LONG))
        stack.push_async_callback(first.close)
        await connected(streams, len(engines))
        yield first


def submitted(prompt):
    return engine_pb2.Submit(token_ids=prompt, sampling=ASKED, priority=3, tenant="t")


async def test_a_long_prompt_is_computed_and_says_by_whom():
    engine, submit = ScriptedEngine(), submitted(LONG)
    async with prefill_by(engine) as first:
        computing = asyncio.ensure_future(first.compute(submit))
        request = await engine.requests.get()
        assert (request.prompt, request.tenant, request.priority) == (tuple(LONG), "t", 3)
        assert (request.sampling.max_tokens, request.sampling.n, request.sampling.stop) == (1, 1, ())
        engine.say(request, "a", 1, last=True)
        await computing
    assert submit.computed_by == "peer0"
    assert submit.sampling == ASKED


async def test_a_short_prompt_is_left_alone():
    engine, submit = ScriptedEngine(), submitted(SHORT)
    async with prefill_by(engine) as first:
        await first.compute(submit)
    assert engine.requests.empty()
    assert submit.computed_by == ""


async def test_a_prompt_that_a_prefill_replica_failed_at_goes_no_further():
    engine, submit = ScriptedEngine(), submitted(LONG)
    async with prefill_by(engine) as first:
        computing = asyncio.ensure_future(first.compute(submit))
        engine.send(Failure((await engine.requests.get()).id, Status.INTERNAL, "no such page"))
        with pytest.raises(QuireError, match="no such page"):
            await computing


@pytest.mark.parametrize("begun", [True, False])
async def test_a_prefill_replica_that_dies_with_a_prompt_is_counted(begun):
    engine = ScriptedEngine()
    async with prefill_by(engine) as first:
        computing = asyncio.ensure_future(first.compute(submitted(LONG)))
        request = await engine.requests.get()
        engine.send(Failure(request.id, Status.UNAVAILABLE, "a shard died", begun))
        assert await computing is begun


@pytest.mark.parametrize("refusal", [QueueFull("as many as may be"), None])
async def test_a_prefill_replica_that_is_full_or_fails_is_done_without(refusal):
    engine, submit = ScriptedEngine(), submitted(LONG)
    engine.refusal = refusal
    async with prefill_by(engine) as first:
        computing = asyncio.ensure_future(first.compute(submit))
        if refusal is None:
            request = await engine.requests.get()
            engine.send(Failure(request.id, Status.UNAVAILABLE, "a shard died"))
        await computing
    assert submit.computed_by == ""


async def test_without_a_ready_prefill_replica_nobody_waits_long():
    submit = submitted(LONG)
    async with prefill_by() as first:
        await asyncio.wait_for(first.compute(submit), 3)
    assert submit.computed_by == ""


async def test_a_request_that_is_given_up_is_cancelled_at_the_prefill_replica():
    engine = ScriptedEngine()
    async with prefill_by(engine) as first:
        computing = asyncio.ensure_future(first.compute(submitted(LONG)))
        request = await engine.requests.get()
        computing.cancel()
        assert await engine.cancelled.get() == request.id
