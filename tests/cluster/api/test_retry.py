"""Clients of several gateways: another is asked, an answer carried on, or the error says when to return."""

import asyncio
import socket
from contextlib import closing
from dataclasses import replace

import grpc
import pytest
from serving import INFO, KEYS, ScriptedEngine, staged

from quire.cluster import AsyncClient, CallOptions, Client, SamplingParams, collect_async
from quire.cluster.api.retry import Attempts
from quire.cluster.api.status import FINGERPRINT_METADATA, REPEATABLE_METADATA, RETRY_METADATA
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.errors import ConfigError, DeadlinePassed, QueueFull, ReplicaDied, Status
from quire.replicas.request import Failure, ResolvedSampling

PROMPT = [5, 6, 7]
GREEDY, SEEDED, DRAWN = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=1.0),
)


def unused() -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def next_request(engine):
    return await asyncio.wait_for(engine.requests.get(), 10)


async def test_a_gateway_that_does_not_answer_is_passed_over():
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        for _ in range(4):  # whichever is asked first
            async with AsyncClient(f"{unused()}, {stage.address}") as client:
                assert (await client.model()).name == "demo"
                answer = asyncio.ensure_future(collect_async(client.generate(PROMPT, DRAWN)))
                engine.say(await next_request(engine), "fine", 4, last=True)
                assert (await answer).text == "fine"
                assert not await client.cancel("nobody")


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
async def test_an_answer_goes_on_at_another_gateway(sampling):
    engine = ScriptedEngine()
    async with staged(engine, gateways=2) as stage:
        stream = stage.client.generate(PROMPT, sampling)
        first = asyncio.ensure_future(anext(stream))
        engine.say(await next_request(engine), "ab", 1, 2)
        assert (await first).text == "ab"
        rest = asyncio.ensure_future(_all(stream))
        await stage.kill_gateway(stage.address.split(",").index(stage.client.gateway))
        again = await next_request(engine)
        engine.say(again, "a", 1)
        engine.say(again, "bc", 2, 3, last=True)
        assert [(d.text, list(d.token_ids)) for d in await rest] == [("c", [3])]


async def test_an_answer_drawn_at_random_ends_with_a_hint():
    engine = ScriptedEngine()
    async with staged(engine, gateways=2) as stage:
        stream = stage.client.generate(PROMPT, DRAWN)
        first = asyncio.ensure_future(anext(stream))
        engine.say(await next_request(engine), "ab", 1, 2)
        await first
        await stage.kill_gateway(stage.address.split(",").index(stage.client.gateway))
        with pytest.raises(ReplicaDied) as raised:
            await anext(stream)
        assert 0 < raised.value.retry_s < 10
        answer = asyncio.ensure_future(collect_async(stage.client.generate(PROMPT, DRAWN)))
        engine.say(await next_request(engine), "fine", 4, last=True)
        assert (await answer).text == "fine"


@pytest.mark.parametrize(
    ("asked", "carried_on"), [(SamplingParams(), False), (SamplingParams(temperature=0), True)]
)
async def test_whether_an_answer_can_be_carried_on_is_the_models_to_say(asked, carried_on):
    """A client does not know with which temperature a model answers where it said nothing."""
    engine = ScriptedEngine(replace(INFO, sampling=ResolvedSampling(temperature=0.7)))
    async with staged(engine, gateways=2) as stage:
        stream = stage.client.generate(PROMPT, asked)
        first = asyncio.ensure_future(anext(stream))
        request = await next_request(engine)
        assert request.sampling.temperature == (0.0 if carried_on else 0.7)
        engine.say(request, "ab", 1, 2)
        await first
        rest = asyncio.ensure_future(_all(stream))
        await stage.kill_gateway(stage.address.split(",").index(stage.client.gateway))
        if carried_on:
            engine.say(await next_request(engine), "abc", 1, 2, 3, last=True)
            assert [d.text for d in await rest] == ["c"]
        else:
            with pytest.raises(ReplicaDied):
                await rest


async def test_the_server_says_who_answers_and_when_to_come_back():
    engine = ScriptedEngine()
    async with staged(engine) as stage, grpc.aio.insecure_channel(stage.address) as channel:
        request = inference_pb2.GenerateRequest(
            sampling=inference_pb2.Sampling(temperature=1.0, max_tokens=9)
        )
        request.token_ids.ids.extend(PROMPT)
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        reading = asyncio.ensure_future(call.read())
        taken = await next_request(engine)
        engine.say(taken, "ab", 1, 2)
        await reading
        assert dict(await call.initial_metadata())[FINGERPRINT_METADATA] == KEYS.fingerprint.hex()
        engine.send(Failure(taken.id, Status.UNAVAILABLE, "shard 1 is gone"))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert int(dict(raised.value.trailing_metadata())[RETRY_METADATA]) == 500


async def test_patience_outlasts_a_gateway_that_is_replaced():
    address, engine = unused(), ScriptedEngine()
    async with staged(engine) as stage:
        port = int(address.rpartition(":")[2])

        async def appear():
            await asyncio.sleep(0.7)
            return await asyncio.start_server(_pipe_to(stage.address), "127.0.0.1", port)

        server = asyncio.ensure_future(appear())
        async with AsyncClient(address, retry_for_s=10) as client:
            answer = asyncio.ensure_future(collect_async(client.generate(PROMPT)))
            engine.say(await next_request(engine), "fine", 4, last=True)
            assert (await answer).text == "fine"
        (await server).close()


async def test_without_patience_or_time_it_fails():
    async with AsyncClient(f"{unused()},{unused()}") as client:
        with pytest.raises(ReplicaDied):
            await collect_async(client.generate(PROMPT))
    async with AsyncClient(unused(), retry_for_s=30) as client:
        with pytest.raises(DeadlinePassed):
            await collect_async(client.generate(PROMPT, options=CallOptions(deadline_s=0.6)))


def test_no_address_is_refused():
    with pytest.raises(ConfigError, match="host:port"):
        Client(" , ")


def test_only_unavailable_is_retried():
    attempts = Attempts(3, 2, retry_for_s=0.0)
    with pytest.raises(QueueFull):
        attempts.failed(QueueFull("full"))
    assert [attempts.failed(ReplicaDied("")), attempts.gateway] == [0.0, 0]
    assert [attempts.failed(ReplicaDied("")), attempts.gateway] == [0.0, 1]
    with pytest.raises(ReplicaDied):
        attempts.failed(ReplicaDied("third"))


def test_an_answer_of_another_model_is_not_carried_on():
    attempts = Attempts(2, 0, retry_for_s=0.0)
    attempts.began({FINGERPRINT_METADATA: "aa", REPEATABLE_METADATA: "1"})
    assert attempts.rest(inference_pb2.Delta(text="ab", token_ids=[1])) is not None
    attempts.failed(ReplicaDied("gone"))
    with pytest.raises(ReplicaDied, match="another model"):
        attempts.began({FINGERPRINT_METADATA: "bb"})


async def _all(stream):
    return [delta async for delta in stream]


def _pipe_to(address):
    """A listener that hands every connection on."""
    host, _, port = address.rpartition(":")

    async def copy(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connected(reader, writer):
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer), return_exceptions=True)

    return connected
