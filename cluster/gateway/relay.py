"""One request's way through the gateway: a replica, its deltas, and another replica if the first dies."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from quire.cluster.api.resume import Delivered, Differs, Repeated, repeatable
from quire.cluster.api.status import error_of
from quire.cluster.gateway.explained import explained
from quire.cluster.gateway.fleet import Fleet, NoReplicaReady, Place
from quire.cluster.gateway.links import Call, ReplicaLink
from quire.cluster.gateway.prefill import PrefillFirst
from quire.protos.quire.v1 import engine_pb2, inference_pb2
from quire.replicas.errors import QuireError, ReplicaDied, Status

SubmitFor = Callable[[ReplicaLink], Awaitable[engine_pb2.Submit]]
"""The request as the replica's model reads it. Raises InvalidRequest if that model cannot."""

_MOST_RETRIES = 3
_MOST_DEATHS = 2
"""Replicas that may die while they compute a request; one that kills two is given to no third."""


class Client(Protocol):
    """Who gets the answer."""

    async def begin(self, fingerprint: str) -> None:
        """What follows is this model's."""

    async def send(self, delta: inference_pb2.Delta) -> None: ...


class Relay:
    """Carries one request until its last delta has been sent."""

    def __init__(
        self,
        fleet: Fleet,
        deadline_s: float | None,
        prefill: PrefillFirst | None = None,
        *,
        explain: bool = False,
    ) -> None:
        """`deadline_s` is on this process' monotonic clock. `explain`: say why which replica was chosen."""
        self._fleet = fleet
        self._prefill = prefill
        self._deadline_s = deadline_s
        self._explain = explain
        self._call: Call | None = None
        self._cancelled = False
        self._delivered = Delivered()
        self._deaths = 0
        self.retries = 0

    def cancel(self) -> None:
        """Ends the request; the last delta says so."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def run(self, submit_for: SubmitFor, client: Client) -> None:
        """Raises the QuireError that the replica failed the request with."""
        request = await _Request.of(submit_for, self._fleet)
        if self._prefill is not None:
            self._deaths += await self._prefill.compute(request.submit)
        while True:
            try:
                await self._attempt(request, client)
                return
            except ReplicaDied as error:
                if not self._may_retry(error, request.submit.sampling):
                    raise
                self.retries += 1

    def _may_retry(self, error: ReplicaDied, sampling: inference_pb2.Sampling) -> bool:
        if isinstance(error, NoReplicaReady | Differs) or self.retries >= _MOST_RETRIES:
            return False
        return not self._delivered or repeatable(sampling)

    async def _attempt(self, request: _Request, client: Client) -> None:
        def send(link: ReplicaLink) -> Call | None:
            return self._send(request, link) if request.fits(link) else None

        async with self._fleet.reserve(request.submit.token_ids, request.submit.tenant, send) as place:
            call = place.call
            if call is None:
                await request.fit(place.link)
                call = self._send(request, place.link)
                place.route.submitted(call.number)
            try:
                await self._forward(place, call, client)
            finally:
                self._call = None
                call.close()

    def _send(self, request: _Request, link: ReplicaLink) -> Call:
        if self._deadline_s is not None:
            request.submit.remaining_s = max(0.0, self._deadline_s - time.monotonic())
        call = self._call = link.submit(request.submit)
        if self._cancelled:
            call.cancel()
        return call

    async def _forward(self, place: Place, call: Call, client: Client) -> None:
        output_ids: list[int] = []
        again = self._delivered.again()
        while True:
            event = await call.next()
            if event.HasField("failure"):
                await self._fail(place, event.failure)
            delta = event.delta
            place.route.answered()
            if delta.index == 0:
                output_ids.extend(delta.token_ids)
            if delta.HasField("usage") and self._explain and (decision := place.route.decision):
                delta.routing.CopyFrom(explained(decision))
            await self._pass_on(place.link, again, delta, client)
            if delta.HasField("usage"):
                place.route.ended(output_ids)
                return

    async def _pass_on(
        self, link: ReplicaLink, again: Repeated, delta: inference_pb2.Delta, client: Client
    ) -> None:
        if not self._delivered:
            await client.begin(link.fingerprint)
        self._delivered.from_model(link.fingerprint)
        if (rest := again.rest(delta)) is not None:
            await client.send(rest)
            self._delivered.add(rest)

    async def _fail(self, place: Place, failure: engine_pb2.Failure) -> None:
        if failure.status != Status.UNAVAILABLE:  # the fault may lie in the request: nobody else is asked
            raise error_of(failure.status, failure.message)
        await self._fleet.report_lost(place.link)
        self._deaths += failure.begun
        if failure.begun and self._deaths >= _MOST_DEATHS:
            raise QuireError(
                f"{self._deaths} replicas died while they computed this request, so it is given to no other: "
                f"{failure.message}"
            )
        raise ReplicaDied(failure.message)


class _Request:
    """A request as one model reads it, and as another one does once that takes it."""

    def __init__(
        self, submit_for: SubmitFor, submit: engine_pb2.Submit, made_for: ReplicaLink | None
    ) -> None:
        self.submit = submit
        self._submit_for, self._made_for = submit_for, made_for

    @staticmethod
    async def of(submit_for: SubmitFor, fleet: Fleet) -> _Request:
        """For the model that is likely to take it. Raises what making it raises if there is no other one."""
        link = await fleet.known()
        try:
            return _Request(submit_for, await submit_for(link), link)
        except QuireError:
            if fleet.all_read_like(link):
                raise
            return _Request(submit_for, engine_pb2.Submit(), None)

    def fits(self, link: ReplicaLink) -> bool:
        """Whether it is made as this replica reads it."""
        return self._made_for is not None and link.reads_like(self._made_for)

    async def fit(self, link: ReplicaLink) -> None:
        """For this replica now. Raises what making it raises."""
        if not self.fits(link):
            self.submit = await self._submit_for(link)
        self._made_for = link
