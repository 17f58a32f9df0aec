"""Requests, events and stats as protos and back: the only place, beside `sampling_proto.py`, that knows both.

The replica's service and the gateway both speak through it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, fields

from quire.kvstore.books.keys import KeySpace
from quire.kvstore.peers.ids import ReplicaId
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
_MODEL = (
    "architecture", "vocab_size", "max_model_tokens", "tp", "page_tokens", "bytes_per_token",
    "bf16_bytes_per_token",
)  # fmt: skip


def request_from_proto(submit: engine_pb2.Submit, request_id: RequestId) -> Request:
    """The request that a gateway submitted, with its deadline on this process's clock."""
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
    """Write what a step did to the request that its gateway calls `call`. In place: a step has many."""
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
        delta.usage.CopyFrom(inference_pb2.Usage(**asdict(output.usage)))
    if output.timings is not None:
        delta.timings.CopyFrom(inference_pb2.Timings(**asdict(output.timings)))


def _logprobs(logprobs: Iterable[TokenLogprob]) -> Iterable[inference_pb2.TokenLogprob]:
    for at in logprobs:
        top = [inference_pb2.RankedToken(token_id=token, logprob=value) for token, value in at.top]
        yield inference_pb2.TokenLogprob(token_id=at.token_id, logprob=at.logprob, top=top)


def model_to_proto(info: ModelInfo) -> inference_pb2.Model:
    """The model as clients and gateways see it."""
    return inference_pb2.Model(
        name=info.model,
        eos_token_ids=info.eos_token_ids,
        kv_formats=[inference_pb2.LayerFormat(k=k, v=v) for k, v in info.kv_formats],
        sampling=sampling_to_proto(info.sampling),
        **{name: getattr(info, name) for name in _MODEL},
    )


def model_from_proto(message: inference_pb2.Model) -> ModelInfo:
    """The model as it was given to `model_to_proto`."""
    return ModelInfo(
        model=message.name,
        eos_token_ids=tuple(message.eos_token_ids),
        kv_formats=tuple((layer.k, layer.v) for layer in message.kv_formats),
        sampling=resolved(sampling_from_proto(message.sampling), ResolvedSampling()),
        **{name: getattr(message, name) for name in _MODEL},
    )


def keys_to_proto(keys: KeySpace) -> engine_pb2.KeySpace:
    return engine_pb2.KeySpace(layout=keys.layout, weights=keys.model, transforms=keys.transforms)


def keys_from_proto(message: engine_pb2.KeySpace) -> KeySpace:
    return KeySpace(message.layout, message.weights, message.transforms)


def load_to_proto(load: LoadReport, seen_call: int) -> engine_pb2.Load:
    """`seen_call`: the last call of one stream that the report counts."""
    return engine_pb2.Load(seen_call=seen_call, **{name: getattr(load, name) for name in _LOAD})


def load_from_proto(message: engine_pb2.Load) -> LoadReport:
    """The report without `taken`, which stays with the replica."""
    return LoadReport(**{name: getattr(message, name) for name in _LOAD})


def stats_to_proto(stats: EngineStats, replica_id: str, uptime_s: float) -> inference_pb2.ReplicaStats:
    """Everything that the engine counts, by the names of its fields and sums."""
    return inference_pb2.ReplicaStats(
        **{name: getattr(stats, name) for name in _STATS}, replica_id=replica_id, uptime_s=uptime_s
    )
