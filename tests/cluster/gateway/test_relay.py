"""What a client sees of a replica that dies, is full, or answers slowly."""

import asyncio
from dataclasses import replace

import pytest
from serving import INFO, ScriptedEngine, output, staged

from quire.cluster import CallOptions, SamplingParams, collect_async
from quire.cluster.api.status import Cancelled
from quire.replicas.errors import DeadlinePassed, QueueFull, QuireError, ReplicaDied, Status
from quire.replicas.request import Failure, FinishReason, Output, ResolvedSampling, Usage

PROMPT = [5, 6, 7]


async def test_deltas_arrive_one_by_one_with_text_tokens_and_usage():
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        stream = stage.client.generate(PROMPT, SamplingParams(max_tokens=3))
        first = asyncio.ensure_future(anext(stream))
        request = await engine.requests.get()
        assert request.prompt == (5, 6, 7)
        assert request.sampling.max_tokens == 3
        engine.say(request, "a", 10)
        assert ((await first).text, list((await first).token_ids)) == ("a", [10])
        engine.say(request, "b", 11, 12, last=True)
        last = await anext(stream)
        assert (last.usage.prompt_tokens, last.timings.first_token_s) == (3, 0.25)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stage.open_requests == 0


async def test_a_step_with_many_requests_reaches_each_its_own():
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        answers = [asyncio.ensure_future(collect_async(stage.client.generate([n + 1]))) for n in range(9)]
        requests = [await engine.requests.get() for _ in answers]
        engine.send(*(output(r, f"<{r.prompt[0]}", 3) for r in requests))
        engine.send(*(output(r, ">", 4, last=True) for r in reversed(requests)))
        assert [(await a).text for a in answers] == [f"<{n + 1}>" for n in range(9)]


async def test_deltas_that_pile_up_become_one_but_never_across_outputs():
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        stream = stage.client.generate(PROMPT, SamplingParams(n=2))
        first = asyncio.ensure_future(anext(stream))
        request = await engine.requests.get()
        steps = [("a", 1, 0), ("b", 2, 0), ("c", 3, 1), ("é", 4, 1), ("d", 5, 0)]
        last = output(request, "!", 6, last=True)
        engine.send(*(output(request, text, token, index=index) for text, token, index in steps), last)
        deltas = [await first, *[delta async for delta in stream]]
        assert [(d.index, d.text, list(d.token_ids)) for d in deltas] == [
            (0, "ab", [1, 2]),
            (1, "cé", [3, 4]),
            (0, "d!", [5, 6]),
        ]
        assert deltas[-1].HasField("usage")


async def test_a_client_that_leaves_is_cancelled_on_its_replica():
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        stream = stage.client.generate(PROMPT)
        first = asyncio.ensure_future(anext(stream))
        request = await engine.requests.get()
        engine.say(request, "a", 10)
        await first
        await stream.aclose()
        assert await engine.cancelled.get() == request.id
        await _until(lambda: stage.open_requests == 0)


async def test_a_passed_deadline_cancels_on_the_replica_too():
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        await stage.client.model()
        answer = asyncio.ensure_future(
            collect_async(stage.client.generate(PROMPT, options=CallOptions(deadline_s=0.5)))
        )
        request = await engine.requests.get()
        assert request.deadline_s is not None
        with pytest.raises(DeadlinePassed, match="longer"):
            await answer
        assert await engine.cancelled.get() == request.id


async def test_cancel_ends_the_stream_with_what_the_replica_says():
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        answer = asyncio.ensure_future(
            collect_async(stage.client.generate(PROMPT, options=CallOptions(request_id="mine")))
        )
        request = await engine.requests.get()
        assert await stage.client.cancel("mine")
        assert await engine.cancelled.get() == request.id
        usage = Usage(prompt_tokens=3, cached_tokens=0, output_tokens=0)
        engine.send(Output(request_id=request.id, index=0, finish_reason=FinishReason.CANCELLED, usage=usage))
        assert (await answer).outputs[0].finish_reason == 3
        assert not await stage.client.cancel("mine")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (Status.RESOURCE_EXHAUSTED, QueueFull),
        (Status.DEADLINE_EXCEEDED, DeadlinePassed),
        (Status.CANCELLED, Cancelled),
        (Status.INTERNAL, QuireError),
    ],
)
async def test_a_failure_keeps_its_status_and_text(status, error):
    engine = ScriptedEngine()
    async with staged(engine) as stage:
        answer = asyncio.ensure_future(collect_async(stage.client.generate(PROMPT)))
        engine.send(Failure((await engine.requests.get()).id, status, "so it is"))
        with pytest.raises(error, match=r"so it is|deadline"):
            await answer


async def test_what_the_engine_refuses_reaches_the_client():
    engine = ScriptedEngine()
    engine.refusal = QueueFull("all 3 places are taken; come back later")
    async with staged(engine) as stage:
        with pytest.raises(QueueFull, match="all 3 places"):
            await collect_async(stage.client.generate(PROMPT))


async def test_what_one_replica_refuses_because_it_is_full_another_one_takes():
    full, other = ScriptedEngine(), ScriptedEngine()
    full.refusal = QueueFull("all 3 places are taken; come back later")
    async with staged(full, other) as stage:
        for _ in range(2):  # in turn: one of them is offered to the full replica first
            answer = asyncio.ensure_future(collect_async(stage.client.generate(PROMPT)))
            other.say(await other.requests.get(), "fine", 4, last=True)
            assert (await answer).text == "fine"
        assert (await stage.client.stats()).gateway_retries == 0
        other.refusal = full.refusal
        with pytest.raises(QueueFull, match="all 3 places"):
            await collect_async(stage.client.generate(PROMPT))
        assert stage.open_requests == 0


async def test_a_request_is_offered_to_three_full_replicas_at_most():
    engines = [ScriptedEngine() for _ in range(4)]
    offers = []
    for engine in engines:
        engine.submit = lambda request: refuse(offers, request)
    async with staged(*engines) as stage:
        with pytest.raises(QueueFull):
            await collect_async(stage.client.generate(PROMPT))
    assert len(offers) == 3


def refuse(offers, request):
    offers.append(request)
    raise QueueFull("come back later")


async def test_what_a_draining_replica_refuses_goes_elsewhere_and_what_it_has_ends_there():
    first, second = ScriptedEngine(), ScriptedEngine()
    async with staged(first, second) as stage:
        answer = asyncio.ensure_future(collect_async(stage.client.generate(PROMPT)))
        (request, leaver), stays, number = await _first_of(first, second, with_request=True)
        draining = asyncio.create_task(stage.services[number].drain())
        for n in range(3):
            more = asyncio.ensure_future(collect_async(stage.client.generate([n + 1])))
            stays.say(await stays.requests.get(), "there", 4, last=True)
            assert (await more).text == "there"
        leaver.say(request, "here", 4, last=True)
        assert (await answer).text == "here"
        await draining
        assert (await stage.client.stats()).gateway_retries == 0


async def test_a_death_before_the_first_delta_is_not_noticed():
    first, second = ScriptedEngine(), ScriptedEngine()
    async with staged(first, second) as stage:
        answer = asyncio.ensure_future(
            collect_async(stage.client.generate(PROMPT, SamplingParams(temperature=1.0)))
        )
        died, lives, number = await _first_of(first, second)
        await stage.kill_replica(number)
        request = await asyncio.wait_for(lives.requests.get(), 5)
        lives.say(request, "fine", 4, last=True)
        assert (await answer).text == "fine"
        assert (await stage.client.stats()).gateway_retries == 1
        assert died.requests.empty()


async def test_what_an_engine_failed_at_is_asked_of_nobody_else():
    first, second = ScriptedEngine(), ScriptedEngine()
    async with staged(first, second) as stage:
        answer = asyncio.ensure_future(collect_async(stage.client.generate(PROMPT)))
        (request, failed), other, _ = await _first_of(first, second, with_request=True)
        failed.send(Failure(request.id, Status.INTERNAL, "the engine failed (IndexError)", begun=True))
        with pytest.raises(QuireError, match="IndexError") as caught:
            await answer
        assert caught.value.status is Status.INTERNAL
        assert other.requests.empty()
        assert (await stage.client.stats()).gateway_retries == 0


async def test_a_request_that_kills_who_computes_it_is_given_to_two_at_most():
    engines = [ScriptedEngine() for _ in range(4)]
    async with staged(*engines) as stage:
        answer = asyncio.ensure_future(collect_async(stage.client.generate(PROMPT)))
        for _ in range(2):
            await _until(lambda: any(not engine.requests.empty() for engine in engines))
            number = next(n for n, engine in enumerate(engines) if not engine.requests.empty())
            engines[number].requests.get_nowait()
            await stage.kill_replica(number)
        with pytest.raises(QuireError, match="2 replicas died while they computed this request") as caught:
            await answer
        assert caught.value.status is Status.INTERNAL
        assert all(engine.requests.empty() for engine in engines)


async def test_a_request_that_only_waited_where_replicas_died_is_asked_of_others():
    engines = [ScriptedEngine() for _ in range(3)]
    async with staged(*engines) as stage:
        answer = asyncio.ensure_future(collect_async(stage.client.generate(PROMPT)))
        for left in (2, 1, 0):
            await _until(lambda: any(not engine.requests.empty() for engine in engines))
            engine = next(engine for engine in engines if not engine.requests.empty())
            request = engine.requests.get_nowait()
            if left:
                engine.send(Failure(request.id, Status.UNAVAILABLE, "the engine failed; its log says where"))
        engine.say(request, "fine", 4, last=True)
        assert (await answer).text == "fine"


async def test_a_greedy_answer_goes_on_where_it_stopped():
    first, second = ScriptedEngine(), ScriptedEngine()
    async with staged(first, second) as stage:
        stream = stage.client.generate(PROMPT)
        delta = asyncio.ensure_future(anext(stream))
        (request, died), lives, _ = await _first_of(first, second, with_request=True)
        died.say(request, "ab", 1, 2)
        assert (await delta).text == "ab"
        died.send(Failure(request.id, Status.UNAVAILABLE, "shard 1 is gone"))
        again = await asyncio.wait_for(lives.requests.get(), 5)
        lives.say(again, "a", 1)
        lives.say(again, "bcd", 2, 3, last=True)
        rest = [delta async for delta in stream]
        assert [(d.text, list(d.token_ids)) for d in rest] == [("cd", [3])]


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(temperature=0.5)])
async def test_an_answer_that_cannot_be_carried_on_is_unavailable(sampling):
    """Greedy, but the other replica's tokens differ; or drawn at random."""
    first, second = ScriptedEngine(), ScriptedEngine()
    async with staged(first, second) as stage:
        stream = stage.client.generate(PROMPT, sampling)
        delta = asyncio.ensure_future(anext(stream))
        (request, died), lives, _ = await _first_of(first, second, with_request=True)
        died.say(request, "ab", 1, 2)
        await delta
        died.send(Failure(request.id, Status.UNAVAILABLE, "shard 1 is gone"))
        if sampling.temperature == 0:
            lives.say(await asyncio.wait_for(lives.requests.get(), 5), "ax", 1, 9)
        with pytest.raises(ReplicaDied, match=r"try again|shard 1"):
            await anext(stream)


@pytest.mark.parametrize("temperature", [None, 0.7])
async def test_what_a_model_draws_by_default_is_not_carried_on(temperature):
    hot = replace(INFO, sampling=ResolvedSampling(temperature=0.7))
    first, second = ScriptedEngine(hot), ScriptedEngine(hot)
    async with staged(first, second) as stage:
        stream = stage.client.generate(PROMPT, SamplingParams(temperature=temperature))
        delta = asyncio.ensure_future(anext(stream))
        (request, died), lives, _ = await _first_of(first, second, with_request=True)
        died.say(request, "ab", 1, 2)
        await delta
        died.send(Failure(request.id, Status.UNAVAILABLE, "shard 1 is gone"))
        with pytest.raises(ReplicaDied, match="shard 1"):
            await anext(stream)
        assert lives.requests.empty()


async def test_without_a_replica_a_request_waits_and_then_says_so():
    engine = ScriptedEngine()
    async with staged(engine, wait_s=0.3) as stage:
        await stage.client.model()
        await stage.kill_replica(0)
        with pytest.raises(ReplicaDied, match=r"no replica was ready within 0\.3 s"):
            await collect_async(stage.client.generate(PROMPT))


async def _first_of(first, second, *, with_request=False):
    """Which engine the request went to: (it, the other one, its number)."""
    await _until(lambda: not (first.requests.empty() and second.requests.empty()))
    number = 0 if second.requests.empty() else 1
    chosen, other = ((first, second), (second, first))[number]
    request = chosen.requests.get_nowait()
    return ((request, chosen) if with_request else chosen), other, number


async def _until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
