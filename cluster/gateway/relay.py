"""One request's way through the gateway: a replica, its deltas, and a second replica if the first dies."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from quire.cluster.gateway.explained import explained
from quire.cluster.gateway.fleet import Fleet, NoReplicaReady, Place
from quire.cluster.gateway.links import Call
from quire.cluster.gateway.prefill import PrefillFirst
from quire.cluster.status import error_of
from quire.protos.quire.v1 import engine_pb2, inference_pb2
from quire.replicas.errors import ReplicaDied, Status

Send = Callable[[inference_pb2.Delta], Awaitable[None]]


@dataclass(slots=True)
class _Delivered:
    """What the client has of one output."""

    token_ids: list[int] = field(default_factory=list)
    characters: int = 0


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
        self._submit = engine_pb2.Submit()
        self._deadline_s = deadline_s
        self._explain = explain
        self._call: Call | None = None
        self._cancelled = False
        self._delivered: defaultdict[int, _Delivered] = defaultdict(_Delivered)
        self.retries = 0

    def cancel(self) -> None:
        """Ends the request; the last delta says so."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def run(self, submit: engine_pb2.Submit, send: Send) -> None:
        """Raises the QuireError that the replica failed the request with."""
        self._submit = submit
        if self._prefill is not None:
            await self._prefill.compute(submit)
        try:
            await self._attempt(send, skip=False)
        except ReplicaDied as error:
            if isinstance(error, NoReplicaReady) or (self._delivered and not self._repeatable()):
                raise
            self.retries += 1
            await self._attempt(send, skip=bool(self._delivered))

    def _repeatable(self) -> bool:
        """Whether another replica would give the same tokens; they are compared all the same."""
        sampling = self._submit.sampling
        return sampling.temperature == 0 or sampling.HasField("seed")

    async def _attempt(self, send: Send, *, skip: bool) -> None:
        async with self._fleet.reserve(self._submit.token_ids, self._submit.tenant) as place:
            if self._deadline_s is not None:
                self._submit.remaining_s = max(0.0, self._deadline_s - time.monotonic())
            call = self._call = place.link.submit(self._submit)
            place.route.submitted(call.number)
            try:
                if self._cancelled:
                    call.cancel()
                await self._forward(place, call, _Resumed(self._delivered, send).send if skip else send)
            finally:
                self._call = None
                call.close()

    async def _forward(self, place: Place, call: Call, send: Send) -> None:
        output_ids: list[int] = []
        while True:
            event = await call.next()
            if event.HasField("failure"):
                await self._fail(place, event.failure)
            delta = event.delta
            place.route.answered()
            if delta.index == 0:
                output_ids.extend(delta.token_ids)
            if delta.HasField("usage"):
                if self._explain and (decision := place.route.decision):
                    delta.routing.CopyFrom(explained(decision))
                await send(delta)
                place.route.ended(output_ids)
                return
            await send(delta)
            delivered = self._delivered[delta.index]
            delivered.token_ids.extend(delta.token_ids)
            delivered.characters += len(delta.text)

    async def _fail(self, place: Place, failure: engine_pb2.Failure) -> None:
        if failure.status == Status.UNAVAILABLE:
            await self._fleet.report_lost(place.link)
            raise ReplicaDied(failure.message)
        raise error_of(failure.status, failure.message)


class _Resumed:
    """Sends only what the client does not have; the rest must agree with what it has."""

    def __init__(self, delivered: dict[int, _Delivered], send: Send) -> None:
        self._send = send
        self._tokens = {index: list(had.token_ids) for index, had in delivered.items()}
        self._characters = {index: had.characters for index, had in delivered.items()}

    async def send(self, delta: inference_pb2.Delta) -> None:
        """Raises ReplicaDied if the new replica's tokens differ from those the client has."""
        had = self._tokens.get(delta.index, [])
        known = min(len(had), len(delta.token_ids))
        if list(delta.token_ids[:known]) != had[:known]:
            raise ReplicaDied(
                "the replica died, and another one's answer differs from what was sent; try again"
            )
        del had[:known]
        if delta.finish_reason and had:
            raise ReplicaDied(
                "the replica died, and another one's answer ends before what was sent; try again"
            )
        characters = min(self._characters.get(delta.index, 0), len(delta.text))
        self._characters[delta.index] = self._characters.get(delta.index, 0) - characters
        rest = inference_pb2.Delta()
        rest.CopyFrom(delta)
        rest.text = delta.text[characters:]
        del rest.token_ids[:known], rest.logprobs[:known]
        rest.ClearField("prompt_logprobs")
        if rest.token_ids or rest.text or rest.finish_reason or rest.HasField("usage"):
            await self._send(rest)
