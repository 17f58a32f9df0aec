import time
from dataclasses import fields, replace
from typing import get_type_hints

from serving import INFO

from quire.protos.quire.v1 import engine_pb2, inference_pb2
from quire.replicas.engine.wire import (
    model_from_proto,
    model_to_proto,
    request_from_proto,
    stats_to_proto,
    write_event,
)
from quire.replicas.errors import Status
from quire.replicas.request import (
    Failure,
    FinishReason,
    Output,
    RequestId,
    ResolvedSampling,
    Timings,
    TokenLogprob,
    Usage,
)
from quire.replicas.stats import EngineStats


def test_a_gateway_knows_the_model_as_the_replica_does():
    sampling = ResolvedSampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.25, repetition_penalty=1.5)
    info = replace(INFO, sampling=sampling)
    assert model_from_proto(model_to_proto(info)) == info
    assert model_to_proto(info).sampling.temperature == 0.7


def test_a_deadline_travels_as_what_remains():
    submit = engine_pb2.Submit(token_ids=[1, 2], remaining_s=60, priority=-3, tenant="t")
    before = time.monotonic()
    request = request_from_proto(submit, RequestId("x"))
    assert before + 60 <= request.deadline_s <= time.monotonic() + 60
    assert (request.prompt, request.priority, request.tenant) == ((1, 2), -3, "t")
    assert request_from_proto(engine_pb2.Submit(), RequestId("x")).deadline_s is None


def test_an_output_keeps_all_it_says():
    event = engine_pb2.Event()
    output = Output(
        request_id=RequestId("x"),
        index=2,
        token_ids=(7, 8),
        text="é",
        logprobs=(TokenLogprob(7, -0.5, ((7, -0.5), (9, -1.5))),),
        prompt_logprobs=(TokenLogprob(3, -2.0),),
        finish_reason=FinishReason.LENGTH,
        usage=Usage(prompt_tokens=0, cached_tokens=0, output_tokens=0),
        timings=Timings(queue_s=0.0, first_token_s=0.25, total_s=1.5),
    )
    write_event(event, 5, output)
    delta = event.delta
    assert (event.call, delta.index, list(delta.token_ids), delta.text) == (5, 2, [7, 8], "é")
    assert [(t.token_id, t.logprob) for t in delta.logprobs[0].top] == [(7, -0.5), (9, -1.5)]
    assert delta.prompt_logprobs[0].logprob == -2.0
    assert delta.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert delta.HasField("usage"), "a usage of zeros still ends the request"
    assert delta.timings.total_s == 1.5


def test_an_empty_output_is_still_a_delta_and_a_failure_is_none():
    event = engine_pb2.Event()
    write_event(event, 1, Output(request_id=RequestId("x"), index=0))
    assert event.WhichOneof("what") == "delta"
    assert not event.delta.HasField("usage")
    write_event(event, 1, Failure(RequestId("x"), Status.UNAVAILABLE, "gone"))
    assert (event.WhichOneof("what"), event.failure.status) == ("failure", "UNAVAILABLE")


def test_every_counter_is_shown():
    names = {f.name for f in fields(EngineStats)}
    sums = {name for name, member in vars(EngineStats).items() if isinstance(member, property)}
    shown = set(inference_pb2.ReplicaStats.DESCRIPTOR.fields_by_name)
    assert names | sums == shown - {"replica_id", "uptime_s", "fingerprint"}
    numbers = {name: n for n, name in enumerate(sorted(names), 1)}
    for name, kind in get_type_hints(EngineStats).items():
        if kind not in (int, float):
            numbers[name] = {"some": numbers[name]}
    stats = EngineStats(**numbers)
    proto = stats_to_proto(stats, "r", 3.5)
    assert {name: getattr(proto, name) for name in names} == numbers
    assert {name: getattr(proto, name) for name in sums} == {name: getattr(stats, name) for name in sums}


def test_sums_follow_from_what_is_counted():
    stats = EngineStats(
        local_tokens=1,
        host_tokens=2,
        remote_tokens=4,
        pages_used=1,
        pages_cached=2,
        pages_free=4,
        output_tokens=6,
        step_part_seconds={"plan": 0.5, "emit": 1.5},
        fetch_failures={"busy": 1, "checksum": 2},
    )
    assert (stats.cached_tokens, stats.pages_total, stats.failed_fetches) == (7, 7, 3)
    assert (stats.step_seconds, stats.output_tokens_per_s) == (2.0, 3.0)
    assert EngineStats().output_tokens_per_s == 0
