"""Requests, events and stats as protos and back: the only place, beside `sampling_proto.py`, that knows both.

The replica's service and the gateway both speak through it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import fields

from quire.kvstore.books.keys import KeySpace
from quire.kvstore.peers.messages import ReplicaId
from quire.protos.quire.v1 import engine_pb2, inference_pb2
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.request import (
    Event,
    Failure,
    FinishReason,
    ModelInfo,
    Output,
    Request,
    RequestId,
    ResolvedSampling,
    TokenLogprob,
    resolved,
)
from quire.replicas.sampling_proto import sampling_from_proto, sampling_to_proto
from quire.replicas.stats import EngineStats

_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
}
_LOAD = tuple(field.name for field in fields(LoadReport) if field.name != "taken")
_STATS = tuple(
    name for name in inference_pb2.ReplicaStats.DESCRIPTOR.fields_by_name if hasattr(EngineStats, name)
)


def request_from_proto(submit: engine_pb2.Submit, request_id: RequestId) -> Request:
    """What the gateway submitted, with its remaining seconds put on this process' clock."""
    deadline_s = time.monotonic() + submit.remaining_s if submit.HasField("remaining_s") else None
    return Request(
        id=request_id,
        prompt=tuple(submit.token_ids),
        sampling=sampling_from_proto(submit.sampling),
        priority=submit.priority,
        tenant=submit.tenant,
        deadline_s=deadline_s,
        computed_by=ReplicaId(submit.computed_by) if submit.computed_by else None,
    )


def write_event(into: engine_pb2.Event, call: int, event: Event) -> None:
    """What a step did to the request that its gateway calls `call`; in place, because a step has many."""
    into.call = call
    if isinstance(event, Failure):
        into.failure.status = event.status
        into.failure.message = event.message
        into.failure.begun = event.begun
    else:
        _write_delta(into.delta, event)


def _write_delta(delta: inference_pb2.Delta, output: Output) -> None:
    delta.SetInParent()
    delta.index = output.index
    delta.text = output.text
    delta.token_ids.extend(output.token_ids)
    if output.logprobs:
        delta.logprobs.extend(_logprobs(output.logprobs))
    if output.prompt_logprobs:
        delta.prompt_logprobs.extend(_logprobs(output.prompt_logprobs))
    if output.finish_reason is not None:
        delta.finish_reason = _FINISH[output.finish_reason]
    if output.usage is not None:
        usage = output.usage
        delta.usage.SetInParent()
        delta.usage.prompt_tokens = usage.prompt_tokens
        delta.usage.cached_tokens = usage.cached_tokens
        delta.usage.output_tokens = usage.output_tokens
    if output.timings is not None:
        timings = output.timings
        delta.timings.SetInParent()
        delta.timings.queue_s = timings.queue_s
        delta.timings.first_token_s = timings.first_token_s
        delta.timings.total_s = timings.total_s


def _logprobs(logprobs: Iterable[TokenLogprob]) -> Iterable[inference_pb2.TokenLogprob]:
    for at in logprobs:
        top = [inference_pb2.RankedToken(token_id=token, logprob=value) for token, value in at.top]
        yield inference_pb2.TokenLogprob(token_id=at.token_id, logprob=at.logprob, top=top)


def model_to_proto(info: ModelInfo) -> inference_pb2.Model:
    return inference_pb2.Model(
        name=info.model,
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        max_model_tokens=info.max_model_tokens,
        eos_token_ids=info.eos_token_ids,
        tp=info.tp,
        page_tokens=info.page_tokens,
        kv_formats=[inference_pb2.LayerFormat(k=k, v=v) for k, v in info.kv_formats],
        bytes_per_token=info.bytes_per_token,
        bf16_bytes_per_token=info.bf16_bytes_per_token,
        sampling=sampling_to_proto(info.sampling),
    )


def model_from_proto(message: inference_pb2.Model) -> ModelInfo:
    """As `model_to_proto` was given it."""
    return ModelInfo(
        model=message.name,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        max_model_tokens=message.max_model_tokens,
        eos_token_ids=tuple(message.eos_token_ids),
        tp=message.tp,
        page_tokens=message.page_tokens,
        kv_formats=tuple((layer.k, layer.v) for layer in message.kv_formats),
        bytes_per_token=message.bytes_per_token,
        bf16_bytes_per_token=message.bf16_bytes_per_token,
        sampling=resolved(sampling_from_proto(message.sampling), ResolvedSampling()),
    )


def keys_to_proto(keys: KeySpace) -> engine_pb2.KeySpace:
    return engine_pb2.KeySpace(layout=keys.layout, weights=keys.model, transforms=keys.transforms)


def keys_from_proto(message: engine_pb2.KeySpace) -> KeySpace:
    return KeySpace(message.layout, message.weights, message.transforms)


def load_to_proto(load: LoadReport, seen_call: int) -> engine_pb2.Load:
    """`seen_call`: `taken`, in the words of one stream."""
    return engine_pb2.Load(seen_call=seen_call, **{name: getattr(load, name) for name in _LOAD})


def load_from_proto(message: engine_pb2.Load) -> LoadReport:
    """`taken` stays with the replica."""
    return LoadReport(**{name: getattr(message, name) for name in _LOAD})


def stats_to_proto(stats: EngineStats, replica_id: str, uptime_s: float) -> inference_pb2.ReplicaStats:
    """Everything that the engine counts, by the names of its fields and sums."""
    return inference_pb2.ReplicaStats(
        **{name: getattr(stats, name) for name in _STATS}, replica_id=replica_id, uptime_s=uptime_s
    )
