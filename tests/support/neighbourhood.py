"""Replicas of one process that share blocks: real engines, links and directory, messages carried as bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.directory import Announcement, Directory, Holder, hints_of
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import Message, decode_message, encode_message
from quire.replicas.config import EngineConfig
from quire.replicas.engine.async_engine import AsyncEngine
from quire.replicas.errors import ReplicaDied
from quire.replicas.request import Event, Failure, Output, Request, RequestId, SamplingParams
from quire.replicas.stats import EngineStats


class Town:
    """Who lives here, and the directory."""

    def __init__(self) -> None:
        self.directory = Directory(100_000, silence_s=3600)
        self.residents: dict[ReplicaId, AsyncEngine] = {}
        self.lock = threading.Lock()


class Way:
    """One replica's `PeerNetwork`. `drops` sees every message first and may swallow it."""

    def __init__(self, town: Town, me: str) -> None:
        self.town, self.me = town, ReplicaId(me)
        self.drops: Callable[[Message], bool] = lambda message: False
        self.looks = True
        self._number = 0

    def send(self, to: ReplicaId, message: Message, failed: Callable[[], None]) -> None:
        neighbour = self.town.residents.get(to)
        if neighbour is None:
            failed()
        elif not self.drops(message):
            try:
                neighbour.on_peer_message(self.me, decode_message(encode_message(message)))
            except ReplicaDied:
                failed()

    def lookup(self, chain: Sequence[BlockKey], answer: Callable[[tuple[Holder, ...]], None]) -> None:
        if self.looks:
            with self.town.lock:
                answer(tuple(h for h in self.town.directory.lookup(chain) if h.owner != self.me))

    def others(self) -> tuple[ReplicaId, ...]:
        return tuple(name for name in self.town.residents if name != self.me)

    def added(self, keys: Sequence[BlockKey]) -> None:
        self._announce(hints_of(keys), b"")

    def removed(self, keys: Sequence[BlockKey]) -> None:
        self._announce(b"", hints_of(keys))

    def _announce(self, added: bytes, removed: bytes) -> None:
        with self.town.lock:
            said = Announcement(self.me, self._number, added, removed)
            assert self.town.directory.announce(said, 0.0)
            self._number += 1


class Resident:
    """A replica that has moved in. A context: it moves out at the end."""

    def __init__(self, town: Town, name: str, config: EngineConfig) -> None:
        self.way = Way(town, name)
        self.engine = AsyncEngine(config, network=self.way)
        self._events: list[Event] = []
        self._more = threading.Condition()
        self._requests = 0
        town.residents[self.way.me] = self.engine
        self.engine.start(self._deliver)

    def ask(
        self,
        prompt: Sequence[int],
        new_tokens: int = 8,
        tenant: str = "",
        computed_by: ReplicaId | None = None,
    ) -> list[Output]:
        """The events of one greedy request, once it has ended."""
        self._requests += 1
        request_id = RequestId(str(self._requests))
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True, logprobs=0)
        self.engine.submit(
            Request(
                id=request_id,
                prompt=tuple(prompt),
                sampling=sampling,
                tenant=tenant,
                computed_by=computed_by,
            )
        )
        deadline = time.monotonic() + 60
        with self._more:
            while True:
                mine = [event for event in self._events if event.request_id == request_id]
                if mine and (isinstance(mine[-1], Failure) or mine[-1].usage):
                    assert all(isinstance(event, Output) for event in mine), mine
                    return [event for event in mine if isinstance(event, Output)]
                assert self._more.wait(max(deadline - time.monotonic(), 0)), "no answer in a minute"

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def move_out(self) -> None:
        self.way.town.residents.pop(self.way.me, None)
        self.engine.close()

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        self.move_out()

    def _deliver(self, events: tuple[Event, ...]) -> None:
        with self._more:
            self._events += events
            self._more.notify()


def answer(outputs: Sequence[Output]) -> list[tuple[int, float]]:
    """Tokens and their log-probabilities: equal only if the logits were."""
    return [(p.token_id, p.logprob) for output in outputs for p in output.logprobs]
