"""The `quire.v1.Inference` service: admits a request, relays its answer, and says how each call ended.

Knows neither Ray nor the engine; replicas are reached through `ReplicaStreams`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from quire.cluster.api.status import answer_metadata, code_of, retry_hint
from quire.cluster.gateway.prefill import PrefillFirst
from quire.cluster.gateway.relay import Relay
from quire.cluster.gateway.replica_stream import ReplicaStream
from quire.cluster.gateway.replica_streams import ReplicaStreams
from quire.cluster.gateway.submission import ClientRequest, check_name
from quire.cluster.gateway.tokenizer import PromptSource
from quire.cluster.metrics.gateway_meter import GatewayNumbers, Meter, Send, Watch
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.admission import check_caller, check_token_ids
from quire.replicas.errors import InvalidRequest, QueueFull, QuireError, Status

_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
_DEADLINE_SLACK_S = 0.1
"""A client's clock began when it asked: its deadline comes before ours. A cancel so near to ours is that."""


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """One for each gateway; all methods run on its event loop."""

    def __init__(
        self,
        streams: ReplicaStreams,
        *,
        max_open_requests: int,
        meter: Meter | None = None,
        prefill: PrefillFirst | None = None,
    ) -> None:
        self._streams = streams
        self._prefill = prefill
        self._meter = meter or Meter()
        self._max_open_requests = max_open_requests
        self._open = 0
        self._retries = 0
        self._relays: dict[str, Relay] = {}

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        await self._answer("Generate", request, context)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> None:
        await self._answer("Chat", request, context)

    async def Cancel(
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        relay = self._relays.get(request.request_id)
        if relay is not None:
            relay.cancel()
        return inference_pb2.CancelResponse(found=relay is not None)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        async with self._answering(context, "Tokenize"):
            stream = await self._serving(request.model)
            if request.messages:
                prompt = PromptSource(messages=request.messages)
            else:
                prompt = PromptSource(text=request.text)
            token_ids = await stream.tokenizer.encode(prompt, stream.info.max_model_tokens)
            return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        async with self._answering(context, "Detokenize"):
            stream = await self._serving(request.model)
            check_token_ids(request.token_ids, stream.info)
            return inference_pb2.DetokenizeResponse(text=await stream.tokenizer.decode(request.token_ids))

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: Context) -> inference_pb2.Model:
        async with self._answering(context, "GetModel"):
            return (await self._serving(request.model)).model

    async def GetStats(self, request: inference_pb2.GetStatsRequest, context: Context) -> inference_pb2.Stats:
        async with self._answering(context, "GetStats"):
            return inference_pb2.Stats(
                model=(await self._streams.any_replica()).model,
                replicas=await self._streams.stats(),
                gateway_open_requests=self._open,
                gateway_retries=self._retries,
            )

    def numbers(self) -> GatewayNumbers:
        """Return what the gateway counts. May be called from any thread."""
        return GatewayNumbers(
            open_requests=self._open,
            max_open_requests=self._max_open_requests,
            retries=self._retries,
            replicas=self._streams.connected,
            outcomes=dict(self._meter.outcomes),
            routing=self._streams.table.numbers(),
        )

    async def _answer(self, method: str, request: ClientRequest, context: Context) -> None:
        async with (
            self._answering(context, method) as watch,
            self._admitted(),
            self._named(request, context) as relay,
        ):
            await relay.run(_Client(context, watch.watched(context.write)))

    @asynccontextmanager
    async def _answering(self, context: Context, method: str) -> AsyncIterator[Watch]:
        """Turn what is raised inside into the call's status; the traceback of a bug goes to the log only."""
        with self._meter.call(method) as watch:
            try:
                yield watch
            except QuireError as error:
                watch.status = error.status.value
                await context.abort(code_of(error), str(error), retry_hint(error))
            except asyncio.CancelledError:  # the client has gone, or its time is over
                left_s = context.time_remaining()
                over = left_s is not None and left_s <= _DEADLINE_SLACK_S
                watch.status = (Status.DEADLINE_EXCEEDED if over else Status.CANCELLED).value
                raise
            except Exception:
                watch.status = Status.INTERNAL.value
                _log.exception("unexpected error while answering a request")
                await context.abort(
                    grpc.StatusCode.INTERNAL, "an error inside the gateway; its log says more"
                )

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self._open >= self._max_open_requests:
            raise QueueFull(
                f"{self._open} requests are open on this gateway, its limit; "
                "come back later, or raise gateway.max_open_requests"
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _serving(self, name: str) -> ReplicaStream:
        stream = await self._streams.any_replica()
        check_name(name, stream.model)
        return stream

    @asynccontextmanager
    async def _named(self, request: ClientRequest, context: Context) -> AsyncIterator[Relay]:
        """Make the request's relay, which Cancel finds by its id from now on."""
        check_caller(request.priority, request.tenant, request.request_id)
        if request.request_id in self._relays:
            raise InvalidRequest(
                f"request_id {request.request_id!r} is in use; ids of open requests are unique"
            )
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        relay = Relay(request, self._streams, deadline_s, self._prefill)
        if request.request_id:
            self._relays[request.request_id] = relay
        try:
            yield relay
        finally:
            self._retries += relay.retries
            if request.request_id:
                del self._relays[request.request_id]


class _Client:
    """The caller of one RPC, who waits for its deltas."""

    def __init__(self, context: Context, send: Send) -> None:
        self._context, self._send = context, send

    async def begin(self, fingerprint: str, *, can_repeat: bool) -> None:
        """See `relay.Client`."""
        await self._context.send_initial_metadata(answer_metadata(fingerprint, can_repeat))

    async def send(self, delta: inference_pb2.Delta) -> None:
        """See `relay.Client`."""
        await self._send(delta)
