"""One request's way through the gateway: a replica, its deltas, and another replica if the first one dies."""

from __future__ import annotations

import time
from typing import Protocol

from quire.cluster.api.resume import Delivered, Differs, Repeated, repeatable
from quire.cluster.api.status import error_of
from quire.cluster.gateway.prefill import PrefillFirst
from quire.cluster.gateway.replica_stream import Call, ReplicaStream
from quire.cluster.gateway.replica_streams import NoReplicaReady, ReplicaStreams
from quire.cluster.gateway.submission import ClientRequest, submission
from quire.cluster.routing.replica_table import Decision, RoutedRequest
from quire.protos.quire.v1 import engine_pb2, inference_pb2
from quire.replicas.errors import QueueFull, QuireError, ReplicaDied, Status

_MAX_RETRIES = 3
_MAX_FULL = 3
"""Full replicas that a request is offered to before its client is told."""
_MAX_DEATHS = 2
"""Replicas that may die while they compute a request; one that kills two is given to no third."""


class Client(Protocol):
    """The client that the answer goes to."""

    async def begin(self, fingerprint: str, *, can_repeat: bool) -> None:
        """Announce the model whose answer follows, and whether the answer can be repeated elsewhere."""

    async def send(self, delta: inference_pb2.Delta) -> None: ...


class _Full(QueueFull):
    """The replica refused the request because its queue is full."""


class _Draining(Exception):
    """The replica refused the request because it is shutting down."""


class Relay:
    """Carries one request until its last delta has been sent."""

    def __init__(
        self,
        request: ClientRequest,
        streams: ReplicaStreams,
        deadline_s: float | None,
        prefill: PrefillFirst | None = None,
    ) -> None:
        """`deadline_s` is on this process' monotonic clock."""
        self._request = request
        self._streams = streams
        self._prefill = prefill
        self._deadline_s = deadline_s
        self._submit = engine_pb2.Submit(tenant=request.tenant)
        self._made_for: ReplicaStream | None = None
        """A replica of the model that `_submit` was made for; None before it is made."""
        self._call: Call | None = None
        self._cancelled = False
        self._delivered = Delivered()
        self._deaths = 0
        self._full: set[str] = set()
        self.retries = 0

    def cancel(self) -> None:
        """End the request; the last delta says so."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def run(self, client: Client) -> None:
        """Relay the answer to the client. Raises the QuireError that the request failed with."""
        await self._make_for_any()
        if self._prefill is not None:
            self._deaths += await self._prefill.compute(self._submit)
        while True:
            try:
                await self._attempt(client)
                return
            except _Draining:
                continue
            except _Full:
                if len(self._full) >= _MAX_FULL or not self._streams.others(self._full):
                    raise
            except ReplicaDied as error:
                if not self._may_retry(error):
                    raise
                self.retries += 1

    async def _make_for_any(self) -> None:
        """Make the request for the model that is likely to take it, so that its tokens can be routed by.

        Raises what making it raises, unless another model is served as well, which may be able to read it.
        """
        stream = await self._streams.any_replica()
        try:
            await self._make_for(stream)
        except QuireError:
            if self._streams.all_same_model_as(stream):
                raise

    async def _make_for(self, stream: ReplicaStream) -> None:
        if self._made_for is None or not stream.same_model_as(self._made_for):
            self._submit = await submission(self._request, stream)
            self._made_for = stream

    def _may_retry(self, error: ReplicaDied) -> bool:
        if isinstance(error, NoReplicaReady | Differs) or self.retries >= _MAX_RETRIES:
            return False
        return not self._delivered or repeatable(self._submit.sampling)

    async def _attempt(self, client: Client) -> None:
        taken = self._streams.take(self._submit.token_ids, self._submit.tenant, self._full)
        async with taken as (stream, routed):
            await self._make_for(stream)
            if self._deadline_s is not None:
                self._submit.remaining_s = max(0.0, self._deadline_s - time.monotonic())
            call = self._call = stream.submit(self._submit)
            routed.call = call.number
            try:
                if self._cancelled:
                    call.cancel()
                await self._forward(stream, routed, call, client)
            finally:
                self._call = None
                call.close()

    async def _forward(
        self, stream: ReplicaStream, routed: RoutedRequest, call: Call, client: Client
    ) -> None:
        output_ids: list[int] = []
        again = self._delivered.again()
        while True:
            event = await call.next()
            if event.HasField("failure"):
                await self._fail(stream, event.failure)
            delta = event.delta
            self._streams.table.answered(routed)
            if delta.index == 0:
                output_ids.extend(delta.token_ids)
            if delta.HasField("usage") and self._request.explain_routing and routed.decision:
                delta.routing.CopyFrom(_explained(routed.decision))
            await self._pass_on(stream, again, delta, client)
            if delta.HasField("usage"):
                self._streams.table.ended(routed, output_ids)
                return

    async def _pass_on(
        self, stream: ReplicaStream, again: Repeated, delta: inference_pb2.Delta, client: Client
    ) -> None:
        if not self._delivered:
            await client.begin(stream.fingerprint, can_repeat=repeatable(self._submit.sampling))
        self._delivered.from_model(stream.fingerprint)
        if (rest := again.rest(delta)) is not None:
            await client.send(rest)
            self._delivered.add(rest)

    async def _fail(self, stream: ReplicaStream, failure: engine_pb2.Failure) -> None:
        if failure.status == Status.RESOURCE_EXHAUSTED:
            self._full.add(stream.replica_id)
            raise _Full(failure.message)
        if failure.status != Status.UNAVAILABLE:  # the request may be at fault: no other replica is asked
            raise error_of(failure.status, failure.message)
        if stream.draining and not failure.begun and not self._delivered:
            raise _Draining
        await stream.report_dead()
        self._deaths += failure.begun
        if failure.begun and self._deaths >= _MAX_DEATHS:
            raise QuireError(
                f"{self._deaths} replicas died while they computed this request, so it is given to no other: "
                f"{failure.message}"
            )
        raise ReplicaDied(failure.message)


def _explained(decision: Decision) -> inference_pb2.Routing:
    """Return a decision as clients see it; where nothing was predicted, no prediction is set."""
    said = inference_pb2.Routing(
        replica_id=decision.replica_id,
        reason=decision.reason.value,
        candidates=decision.candidates,
        scoring_us=decision.scoring_s * 1e6,
    )
    if (predicted := decision.predicted) is not None:
        said.predicted_first_token_s = predicted.first_token_s
        said.expected_cached_tokens = predicted.cached_tokens
        said.expected_fetched_tokens = predicted.fetched_tokens
        said.wait_s = predicted.wait_s + predicted.pressure_s
        said.work_s = predicted.work_s
    return said
