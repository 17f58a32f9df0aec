"""The gateway with a real engine behind it: good requests, bad ones, and what is left afterwards."""

import asyncio

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serving import Listed, Stage, staged

from quire.cluster import AsyncClient, CallOptions, SamplingParams, collect_async
from quire.cluster.config import GatewayConfig
from quire.cluster.gateway.grpc_service import InferenceService
from quire.cluster.gateway.replica_streams import ReplicaStreams
from quire.cluster.gateway.server import listen
from quire.cluster.gateway.tokenizer import ChatTokenizer
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.config import EngineConfig, PoolConfig, SchedulerConfig
from quire.replicas.engine.async_engine import AsyncEngine
from quire.replicas.errors import ConfigError, InvalidRequest, QueueFull, UnknownModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_TOKENS = 200
LONG = SamplingParams(max_tokens=60, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stage():
    config = EngineConfig(
        model="demo",
        kv="int8",
        max_model_tokens=MAX_TOKENS,
        threads_per_shard=1,
        pool=PoolConfig(bytes=4 << 20),
        scheduler=SchedulerConfig(max_running=2, max_queued=4),
    )
    engine = await asyncio.to_thread(AsyncEngine, config)
    async with staged(engine, max_open_requests=32) as stage:
        yield stage
    await asyncio.to_thread(engine.close)


async def test_text_and_its_token_ids_give_the_same_answer(stage: Stage):
    client = stage.client
    text = "Long ago, a cat named"
    ids = await client.tokenize(text)
    by_text = await collect_async(client.generate(text, SamplingParams(max_tokens=9)))
    by_ids = await collect_async(client.generate(ids, SamplingParams(max_tokens=9)))
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert await client.detokenize(by_text.outputs[0].token_ids) == by_text.text
    assert by_text.outputs[0].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (by_text.usage.prompt_tokens, by_text.usage.output_tokens) == (len(ids), 9)
    assert 0 <= by_text.timings.queue_s <= by_text.timings.first_token_s <= by_text.timings.total_s


async def test_a_chat_goes_through_the_models_template(stage: Stage):
    ids = await stage.client.tokenize(messages=[{"role": "user", "content": "The pass key is 71432."}])
    assert await stage.client.detokenize(ids) != ""
    turns = [
        {"role": "user", "content": "The pass key is 71432."},
        {"role": "assistant", "content": "I will remember that."},
        {"role": "user", "content": "What is the pass key?"},
    ]
    answer = await collect_async(stage.client.chat(turns, SamplingParams(max_tokens=30)))
    assert answer.text == "The pass key is 71432."
    assert answer.outputs[0].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert answer.usage.prompt_tokens == len(await stage.client.tokenize(messages=turns))


async def test_n_outputs_logprobs_and_stop_texts_arrive(stage: Stage):
    sampling = SamplingParams(
        max_tokens=12, n=3, temperature=1.0, seed=3, logprobs=2, prompt_logprobs=1, stop=("zzzz",)
    )
    answer = await collect_async(stage.client.generate([5, 6, 7, 8], sampling))
    assert sorted(answer.outputs) == [0, 1, 2]
    assert len(answer.prompt_logprobs) == 3
    for output in answer.outputs.values():
        assert [at.token_id for at in output.logprobs] == output.token_ids
        assert all(len(at.top) == 2 and at.logprob <= 0 for at in output.logprobs)
        assert output.finish_reason
    again = await collect_async(stage.client.generate([5, 6, 7, 8], sampling))
    assert again.outputs[2].token_ids == answer.outputs[2].token_ids
    assert answer.usage.output_tokens == sum(len(o.token_ids) for o in answer.outputs.values())


async def test_output_ends_before_a_stop_text(stage: Stage):
    whole = await collect_async(stage.client.chat(HELLO, SamplingParams(max_tokens=30)))
    assert "help" in whole.text
    cut = await collect_async(stage.client.chat(HELLO, SamplingParams(max_tokens=30, stop=("help",))))
    assert cut.text == whole.text[: whole.text.index("help")]


@pytest.mark.parametrize(
    ("prompt", "sampling", "text"),
    [
        ([], SamplingParams(), "prompt is empty"),
        (list(range(MAX_TOKENS)), SamplingParams(), f"has {MAX_TOKENS} tokens.*Shorten"),
        ("word " * 300, SamplingParams(), "Shorten the prompt"),
        ([5, 4096], SamplingParams(), r"4096 is not in the model's vocabulary 0\.\.4095"),
        ([5, -1], SamplingParams(), r"prompt\[1\] must be a token id"),
        ([5], SamplingParams(stop_token_ids=(9999,)), "stop_token_ids"),
    ],
)
async def test_a_bad_prompt_is_refused_in_words(stage: Stage, prompt, sampling, text):
    with pytest.raises(InvalidRequest, match=text):
        await collect_async(stage.client.generate(prompt, sampling))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("max_tokens", 0, "max_tokens must be in 1..4294967295, got 0"),
        ("min_tokens", 999, "min_tokens"),
        ("temperature", -1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.5, "top_p"),
        ("min_p", 2, "min_p"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("presence_penalty", 3, "presence_penalty"),
        ("logprobs", 21, "logprobs"),
        ("n", 17, "n must be in 1..16"),
        ("n", 0, "n must be in 1..16"),
        ("stop", [""], "empty text"),
    ],
)
async def test_impossible_sampling_is_refused_by_the_server(stage: Stage, field, value, text):
    """Foreign clients do not check; ours does, so this one speaks protos."""
    request = inference_pb2.GenerateRequest(text="a", sampling=inference_pb2.Sampling(**{field: value}))
    code, details = await _status_of(stage, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details


async def test_a_request_without_a_prompt_or_with_an_unfit_priority_is_refused(stage: Stage):
    assert "no prompt" in (await _status_of(stage, inference_pb2.GenerateRequest()))[1]
    request = inference_pb2.GenerateRequest(text="a", priority=1000)
    assert "priority must be in" in (await _status_of(stage, request))[1]


@pytest.mark.parametrize(
    ("request_of", "said"),
    [
        (lambda: inference_pb2.GenerateRequest(text="a", tenant="x" * 1_000_000), "tenant has 1000000"),
        (lambda: inference_pb2.GenerateRequest(text="a", request_id="x" * 257), "request_id has 257"),
        (lambda: inference_pb2.GenerateRequest(text="a", model="x" * 1_000_000), "no model"),
        (lambda: inference_pb2.GenerateRequest(text="word " * 3_000_000), "Shorten the prompt"),
        (
            lambda: inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[9] * 3_000_000)),
            "has 3000000 tokens",
        ),
    ],
)
async def test_what_is_too_much_of_anything_is_refused_in_few_words(stage: Stage, request_of, said):
    code, details = await _status_of(stage, request_of())
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert said in details
    assert len(details) < 400


async def test_every_rpc_refuses_a_long_text_or_many_ids(stage: Stage):
    client, text = stage.client, "word " * 500_000
    with pytest.raises(InvalidRequest, match="Shorten the prompt"):
        await client.tokenize(text)
    for messages in (
        [{"role": "user", "content": text}],
        [{"role": "user", "content": "a"}] * (MAX_TOKENS + 1),
    ):
        with pytest.raises(InvalidRequest, match=f"{MAX_TOKENS} tokens"):
            await client.tokenize(messages=messages)
        with pytest.raises(InvalidRequest, match=f"{MAX_TOKENS} tokens"):
            await collect_async(client.chat(messages))
    with pytest.raises(InvalidRequest, match=f"serves {MAX_TOKENS} at most"):
        await client.detokenize([9] * 1_000_000)
    with pytest.raises(InvalidRequest, match="4096 is not in the model's vocabulary"):
        await client.detokenize([4096])
    assert len(await client.tokenize("word " * 150)) > 150


async def test_tokens_in_front_are_there_once(stage: Stage):
    ids = await stage.client.tokenize("Once")
    assert await stage.client.tokenize("<|bos|>Once") == ids


async def test_a_chat_without_messages_is_refused(stage: Stage):
    with pytest.raises(InvalidRequest, match="no messages"):
        await collect_async(stage.client.chat([]))


async def test_another_models_name_is_not_found(stage: Stage):
    with pytest.raises(UnknownModel, match="'demo' is"):
        await collect_async(stage.client.generate("a", options=CallOptions(model="llama")))
    answer = stage.client.generate("a", SamplingParams(max_tokens=1), CallOptions(model="demo"))
    assert (await collect_async(answer)).usage.output_tokens == 1
    with pytest.raises(UnknownModel):
        await collect_async(
            stage.client.chat([{"role": "user", "content": "x"}], options=CallOptions(model="llama"))
        )


async def test_a_request_id_is_unique_among_the_open(stage: Stage):
    options = CallOptions(request_id="twice")
    stream = stage.client.generate([5, 6], LONG, options)
    await anext(stream)
    with pytest.raises(InvalidRequest, match="in use"):
        await collect_async(stage.client.generate([5, 6], LONG, options))
    await stream.aclose()
    await _quiet(stage)
    assert (await collect_async(stage.client.generate([5], SamplingParams(max_tokens=1), options))).outputs


async def test_the_engines_queue_bound_is_told(stage: Stage):
    streams = [stage.client.generate([5, 6, n], LONG) for n in range(9)]
    results = await asyncio.gather(*(anext(s) for s in streams), return_exceptions=True)
    refused = [r for r in results if isinstance(r, QueueFull)]
    assert refused
    assert "scheduler.max_queued" in str(refused[0])
    for stream in streams:
        await stream.aclose()
    await _quiet(stage)


async def test_one_more_than_the_gateway_takes_is_refused():
    streams = ReplicaStreams(Listed(), secret="", wait_s=9)
    service = InferenceService(streams, max_open_requests=1)
    gateway = await listen(service, GatewayConfig(port=0))
    async with AsyncClient(f"127.0.0.1:{gateway.port}") as client:
        both = [asyncio.ensure_future(collect_async(client.generate("a"))) for _ in range(2)]
        done, waiting = await asyncio.wait(both, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(QueueFull, match=r"gateway\.max_open_requests"):
            await done.pop()
        waiting.pop().cancel()
    await gateway.stop(None)


async def test_every_page_comes_back_after_cancellations(stage: Stage):
    async def leave(number: int) -> None:
        stream = stage.client.generate([5, 6, number], LONG, CallOptions(request_id=f"leave{number}"))
        async for delta in stream:
            if len(delta.token_ids) and number % 2:
                await stage.client.cancel(f"leave{number}")
            elif not number % 2:
                break
        await stream.aclose()

    for _ in range(2):
        await asyncio.gather(*(leave(n) for n in range(4)))
    stats = await _quiet(stage)
    assert stats.requests_cancelled > 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    assert stage.open_requests == 0


async def test_model_and_stats_say_what_is_stored_how(stage: Stage):
    model = await stage.client.model()
    assert (model.name, model.max_model_tokens, model.tp, len(model.kv_formats)) == ("demo", MAX_TOKENS, 1, 6)
    assert model.sampling.HasField("temperature")
    assert model.bytes_per_token < 0.6 * model.bf16_bytes_per_token
    stats = await stage.client.stats()
    (replica,) = stats.replicas
    assert replica.replica_id == "replica0"
    assert replica.steps > 0
    assert replica.output_tokens_per_s > 0
    assert stats.gateway_open_requests == 0


async def test_health_and_reflection_answer(stage: Stage):
    async with grpc.aio.insecure_channel(stage.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "quire.v1.Inference"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        listed = await anext(aiter(reflection))
        names = {service.name for service in listed.list_services_response.service}
        assert {"quire.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_said_plainly(stage: Stage):
    port = int(stage.address.rsplit(":", 1)[1])
    streams = ReplicaStreams(Listed(), secret="", wait_s=1)
    service = InferenceService(streams, max_open_requests=1)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*gateway.port"):
        await listen(service, GatewayConfig(port=port))


async def test_a_bug_is_internal_without_its_traceback(stage: Stage, monkeypatch):
    def broken(*args):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(ChatTokenizer, "decode", broken)
    async with grpc.aio.insecure_channel(stage.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Detokenize(inference_pb2.DetokenizeRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()


async def _status_of(stage: Stage, request) -> tuple[grpc.StatusCode, str]:
    async with grpc.aio.insecure_channel(stage.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Generate(request).read()
    return caught.value.code(), caught.value.details()


async def _quiet(stage: Stage) -> inference_pb2.ReplicaStats:
    """The replica's stats once nothing runs."""
    async with asyncio.timeout(10):
        while True:
            (stats,) = (await stage.client.stats()).replicas
            if not (stats.running or stats.queued):
                return stats
            await asyncio.sleep(0.02)
