"""The Engine service as a gateway uses it: the hello, one message a step, the lease."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from serving import SECRET, ScriptedEngine, output

from quire.protos.quire.v1 import engine_pb2, engine_pb2_grpc
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.engine.service import SECRET_METADATA, EngineService, listen
from quire.replicas.engine.wire import keys_from_proto, load_from_proto
from quire.replicas.errors import InvalidRequest
from quire.replicas.request import Failure


@asynccontextmanager
async def connected(engine, secret=SECRET, **given):
    service = EngineService(engine, secret=SECRET, replica_id="r1", **given)
    server, address = await listen(service, "127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        yield engine_pb2_grpc.EngineStub(channel).Connect(metadata=((SECRET_METADATA, secret),))
    await server.stop(None)


async def said(stream):
    """The next message that is no mere report of the replica's load."""
    while (message := await stream.read()) is not grpc.aio.EOF:
        if not message.HasField("load"):
            return message
    return message


def submit(call, *token_ids, **fields):
    return engine_pb2.GatewayMessage(submit=engine_pb2.Submit(call=call, token_ids=token_ids, **fields))


async def test_the_first_message_says_who_answers():
    async with connected(ScriptedEngine()) as stream:
        hello = (await stream.read()).hello
    assert (hello.replica_id, hello.model.name, hello.model.bytes_per_token) == ("r1", "demo", 100)


@pytest.mark.parametrize("secret", ["", "tests onl", "tests only!"])
async def test_a_wrong_secret_is_refused(secret):
    async with connected(ScriptedEngine(), secret) as stream:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert SECRET not in caught.value.details()


async def test_a_step_is_one_message_for_all_requests():
    engine = ScriptedEngine()
    async with connected(engine) as stream:
        await said(stream)
        for call in (4, 9, 7):
            await stream.write(submit(call, call))
        requests = [await engine.requests.get() for _ in range(3)]
        engine.send(*(output(r, "x", 1) for r in requests))
        step = (await said(stream)).step
        assert [(e.call, e.delta.text) for e in step.events] == [(4, "x"), (9, "x"), (7, "x")]


async def test_steps_that_wait_for_a_slow_gateway_become_one_message():
    engine = ScriptedEngine()
    async with connected(engine) as stream:
        await said(stream)
        await stream.write(submit(1, 5))
        request = await engine.requests.get()
        for token in range(5):
            engine.send(output(request, "x", token))
        step = (await said(stream)).step
        assert [e.delta.token_ids[0] for e in step.events] == [0, 1, 2, 3, 4]


async def test_a_refused_request_fails_on_its_own_call():
    engine = ScriptedEngine()
    engine.refusal = InvalidRequest("token 9999 is outside the vocabulary")
    async with connected(engine) as stream:
        await said(stream)
        await stream.write(submit(3, 9999))
        (event,) = (await said(stream)).step.events
        assert (event.call, event.failure.status) == (3, "INVALID_ARGUMENT")
        assert "9999" in event.failure.message


async def test_a_request_that_cannot_be_read_costs_the_others_nothing():
    engine = ScriptedEngine()
    async with connected(engine) as stream:
        await said(stream)
        await stream.write(submit(1, 5))
        request = await engine.requests.get()
        engine.refusal = TypeError("not a number")
        await stream.write(submit(2, 6))
        (event,) = (await said(stream)).step.events
        assert (event.call, event.failure.status) == (2, "INTERNAL")
        assert "TypeError: not a number" in event.failure.message
        engine.say(request, "x", 1)
        assert (await said(stream)).step.events[0].delta.text == "x"


async def test_an_answer_that_cannot_be_said_costs_the_others_of_its_step_nothing():
    engine = ScriptedEngine()
    async with connected(engine) as stream:
        await said(stream)
        for call in (4, 9, 7):
            await stream.write(submit(call, call))
        requests = [await engine.requests.get() for _ in range(3)]
        texts = ["x", "\ud800", "y"]  # half a surrogate pair is no text
        engine.send(*(output(r, text, 1) for r, text in zip(requests, texts, strict=True)))
        step = (await said(stream)).step
        assert [(e.call, e.failure.status or e.delta.text) for e in step.events] == [
            (4, "x"),
            (9, "INTERNAL"),
            (7, "y"),
        ]
        assert await engine.cancelled.get() == requests[1].id
        engine.say(requests[1], "z", 2)  # it is over
        engine.say(requests[2], "z", 2)
        assert [e.call for e in (await said(stream)).step.events] == [7]


async def test_only_the_cancelled_call_is_cancelled():
    engine = ScriptedEngine()
    async with connected(engine) as stream:
        await said(stream)
        await stream.write(submit(1, 5))
        await stream.write(submit(2, 6))
        first, second = await engine.requests.get(), await engine.requests.get()
        await stream.write(engine_pb2.GatewayMessage(cancel=engine_pb2.CancelCall(call=77)))
        await stream.write(engine_pb2.GatewayMessage(cancel=engine_pb2.CancelCall(call=2)))
        assert await engine.cancelled.get() == second.id
        assert first.id != second.id
        assert engine.cancelled.empty()


async def test_a_replica_that_drains_says_so_refuses_what_comes_and_lets_end_what_is_open():
    engine = ScriptedEngine()
    service = EngineService(engine, secret=SECRET, replica_id="r1")
    server, address = await listen(service, "127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        stream = engine_pb2_grpc.EngineStub(channel).Connect(metadata=((SECRET_METADATA, SECRET),))
        await said(stream)
        await stream.write(submit(1, 5))
        request = await engine.requests.get()
        draining = asyncio.create_task(service.drain())
        assert (await said(stream)).HasField("draining")
        await stream.write(submit(2, 6))
        (refused,) = (await said(stream)).step.events
        assert (refused.call, refused.failure.status) == (2, "UNAVAILABLE")
        assert not draining.done()
        engine.say(request, "x", 1, last=True)
        (last,) = (await said(stream)).step.events
        assert (last.call, last.delta.text) == (1, "x")
        await asyncio.wait_for(draining, 30)
        late = engine_pb2_grpc.EngineStub(channel).Connect(metadata=((SECRET_METADATA, SECRET),))
        assert (await said(late)).HasField("hello")
        assert (await said(late)).HasField("draining")
    await server.stop(None)


@pytest.mark.parametrize("end", ["cancel", "done_writing"])
async def test_the_end_of_the_stream_cancels_what_is_open(end):
    engine = ScriptedEngine()
    async with connected(engine) as stream:
        await said(stream)
        for call in (1, 2, 3):
            await stream.write(submit(call, call))
        requests = [await engine.requests.get() for _ in range(3)]
        engine.send(output(requests[1], "", 1, last=True))
        await said(stream)
        ended = getattr(stream, end)()
        if end == "done_writing":
            await ended
        cancelled = {await engine.cancelled.get(), await engine.cancelled.get()}
        assert cancelled == {requests[0].id, requests[2].id}
        assert engine.cancelled.empty()


async def test_two_gateways_may_use_the_same_call_numbers():
    engine = ScriptedEngine()
    service = EngineService(engine, secret=SECRET, replica_id="r1")
    server, address = await listen(service, "127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        streams = [stub.Connect(metadata=((SECRET_METADATA, SECRET),)) for _ in range(2)]
        for number, stream in enumerate(streams):
            await said(stream)
            await stream.write(submit(1, 10 + number))
        requests = [await engine.requests.get() for _ in range(2)]
        engine.send(*(Failure(r.id, "INTERNAL", str(r.prompt[0])) for r in requests))
        for number, stream in enumerate(streams):
            (event,) = (await said(stream)).step.events
            assert event.failure.message == str(10 + number)
    await server.stop(None)


async def test_stats_come_back_with_their_question():
    async with connected(ScriptedEngine()) as stream:
        await said(stream)
        await stream.write(engine_pb2.GatewayMessage(stats=engine_pb2.StatsQuery(query=5)))
        answer = (await asyncio.wait_for(said(stream), 5)).stats
    assert answer.query == 5
    assert (answer.stats.pages_total, answer.stats.output_tokens_per_s) == (7, 5.0)


async def test_gateways_hear_of_the_load_and_which_of_their_calls_it_counts():
    engine = ScriptedEngine()
    async with connected(engine) as stream:
        assert keys_from_proto((await stream.read()).hello.keys) == engine.keys
        first = (await stream.read()).load
        assert (load_from_proto(first), first.seen_call) == (engine.load, 0)
        await stream.write(submit(3, 5))
        await stream.write(submit(8, 5))
        request = await engine.requests.get()
        await engine.requests.get()
        engine.load = LoadReport(taken=1, queued_tokens=7)
        engine.send(output(request, "x", 1))
        step = (await stream.read()).step  # with the events, not beside them
        assert (len(step.events), step.load.queued_tokens, step.load.seen_call) == (1, 7, 3)
        engine.load = LoadReport(taken=2, queued_tokens=9)
        quiet = (await asyncio.wait_for(stream.read(), 5)).load
        assert (quiet.queued_tokens, quiet.seen_call) == (9, 8)
        again = (await asyncio.wait_for(stream.read(), 5)).load  # nothing has changed: it still lives
        assert again == quiet
