"""The `quire.v1.Inference` service: checks a request, makes a prompt of it, relays the answer.

Knows neither Ray nor the engine; replicas are reached through the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from reprlib import repr as shown
from typing import Any

import grpc

from quire.cluster.api.resume import repeatable
from quire.cluster.api.status import answer_metadata, code_of, retry_hint
from quire.cluster.gateway.fleet import Fleet
from quire.cluster.gateway.links import ReplicaLink
from quire.cluster.gateway.prefill import PrefillFirst
from quire.cluster.gateway.relay import Relay
from quire.cluster.metrics.gateway_meter import GatewayNumbers, Meter, Send, Watch
from quire.protos.quire.v1 import engine_pb2, inference_pb2, inference_pb2_grpc
from quire.replicas.admission import check_caller, check_prompt, check_sampling, check_token_ids
from quire.replicas.errors import InvalidRequest, QueueFull, QuireError, Status, UnknownModel
from quire.replicas.sampling_proto import sampling_from_proto

_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
Asked = inference_pb2.GenerateRequest | inference_pb2.ChatRequest
_DEADLINE_SLACK_S = 0.1
"""A client's clock began when it asked: its deadline comes before ours. A cancel so near to ours is that."""


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """One for each gateway; all methods run on its event loop."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        max_open_requests: int,
        meter: Meter | None = None,
        prefill: PrefillFirst | None = None,
    ) -> None:
        self._fleet = fleet
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
            link = await self._serving(request.model)
            if request.messages:
                token_ids = await _chat_ids(request, link)
            else:
                token_ids = await link.prompts.encode(request.text, link.info.max_model_tokens)
            return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        async with self._answering(context, "Detokenize"):
            link = await self._serving(request.model)
            check_token_ids(request.token_ids, link.info)
            return inference_pb2.DetokenizeResponse(text=await link.prompts.decode(request.token_ids))

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: Context) -> inference_pb2.Model:
        async with self._answering(context, "GetModel"):
            return (await self._serving(request.model)).model

    async def GetStats(self, request: inference_pb2.GetStatsRequest, context: Context) -> inference_pb2.Stats:
        async with self._answering(context, "GetStats"):
            return inference_pb2.Stats(
                model=(await self._fleet.known()).model,
                replicas=await self._fleet.stats(),
                gateway_open_requests=self._open,
                gateway_retries=self._retries,
            )

    def numbers(self) -> GatewayNumbers:
        """What it counts. From any thread."""
        return GatewayNumbers(
            open_requests=self._open,
            max_open_requests=self._max_open_requests,
            retries=self._retries,
            replicas=self._fleet.linked,
            outcomes=dict(self._meter.outcomes),
            routing=self._fleet.routes.numbers(),
        )

    async def _answer(self, method: str, request: Asked, context: Context) -> None:
        async with (
            self._answering(context, method) as watch,
            self._admitted(),
            self._named(request, context) as relay,
        ):
            caller = _Caller(request, context, watch.watched(context.write))
            await relay.run(caller.submit_for, caller)

    @asynccontextmanager
    async def _answering(self, context: Context, method: str) -> AsyncIterator[Watch]:
        """Turns what is raised inside into the call's status; a bug shows its traceback in the log only."""
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

    async def _serving(self, name: str) -> ReplicaLink:
        link = await self._fleet.known()
        _check_name(name, link.model)
        return link

    @asynccontextmanager
    async def _named(self, request: Asked, context: Context) -> AsyncIterator[Relay]:
        """The request's relay, to be found by its id from the first moment on."""
        check_caller(request.priority, request.tenant, request.request_id)
        if request.request_id in self._relays:
            raise InvalidRequest(
                f"request_id {request.request_id!r} is in use; ids of open requests are unique"
            )
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        relay = Relay(self._fleet, deadline_s, self._prefill, explain=request.explain_routing)
        if request.request_id:
            self._relays[request.request_id] = relay
        try:
            yield relay
        finally:
            self._retries += relay.retries
            if request.request_id:
                del self._relays[request.request_id]


class _Caller:
    """One request and the client that waits for its answer."""

    def __init__(self, request: Asked, context: Context, write: Send) -> None:
        self._request, self._context, self._write = request, context, write
        self._repeatable = False

    async def submit_for(self, link: ReplicaLink) -> engine_pb2.Submit:
        """The request as the replica's model reads it: with its tokens, and with its defaults of sampling.

        Raises what it raises for a request that no replica could answer.
        """
        request = self._request
        _check_name(request.model, link.model)
        sampling = inference_pb2.Sampling()
        sampling.CopyFrom(link.model.sampling)
        sampling.MergeFrom(request.sampling)
        params = sampling_from_proto(sampling)
        token_ids = await _prompt_ids(request, link)
        check_prompt(token_ids, link.info)
        check_sampling(params, link.info, len(token_ids))
        self._repeatable = repeatable(sampling)
        return engine_pb2.Submit(
            token_ids=token_ids, sampling=sampling, priority=request.priority, tenant=request.tenant
        )

    async def begin(self, fingerprint: str) -> None:
        await self._context.send_initial_metadata(answer_metadata(fingerprint, self._repeatable))

    async def send(self, delta: inference_pb2.Delta) -> None:
        await self._write(delta)


async def _prompt_ids(request: Asked, link: ReplicaLink) -> Sequence[int]:
    if isinstance(request, inference_pb2.ChatRequest):
        return await _chat_ids(request, link)
    match request.WhichOneof("prompt"):
        case "text":
            return await link.prompts.encode(request.text, link.info.max_model_tokens)
        case "token_ids":
            return request.token_ids.ids
        case _:
            raise InvalidRequest("the request has no prompt; set text or token_ids")


async def _chat_ids(
    request: inference_pb2.ChatRequest | inference_pb2.TokenizeRequest, link: ReplicaLink
) -> list[int]:
    return await link.prompts.encode_chat(request.messages, link.info.max_model_tokens, request.ByteSize())


def _check_name(name: str, model: inference_pb2.Model) -> None:
    if name not in ("", model.name):
        raise UnknownModel(
            f"no model {shown(name)} is served here; {model.name!r} is. Leave the name empty for it"
        )
