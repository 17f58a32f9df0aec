"""The replicas as a gateway sees them: which one takes a request, and the links to them.

Whoever decides (`ReplicaChooser`: Ray Serve's router, which asks the request's `Route`, or a fixed address in
tests) only names a replica; requests and tokens travel on the link.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
)
from dataclasses import dataclass
from typing import Protocol

from quire.cluster.gateway.early import Early, Send
from quire.cluster.gateway.links import Call, ReplicaLink
from quire.cluster.gateway.prompts import Tokenizers
from quire.cluster.routing.book import Route, Routes
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import QuireError, ReplicaDied

_ANSWER_S = 5.0
"""How long a replica may take to say hello, or to tell its stats."""
_GIVE_BACK_S = 1.0
"""How long a gateway that ends waits until Serve has its places back."""
_PAUSE_S = 0.1
_LOOK_S = 0.25
"""How often a request that waits for a place looks whether the replica is still there."""
_MEETINGS = 16
"""Links that are made at once beside requests."""
_AVOID_S = 5.0
"""For so long a replica that failed as dead is passed over: time for Serve to replace it, if it is."""


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """A replica that was chosen for a request."""

    replica_id: str
    """Never used again for another replica."""
    address: str
    """host:port of its Engine service."""
    place: str = ""
    """Ray Serve's name of the place that the request holds there; empty where nobody counts."""


class ReplicaChooser(Protocol):
    """Decides which replica takes a request, and counts it there as long as the context is held."""

    def choose(self, route: Route) -> AbstractAsyncContextManager[ReplicaAddress]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A request's place on a replica."""

    link: ReplicaLink
    route: Route
    call: Call | None
    """The request, where it was sent there already."""


_NONE_UP = "none is up and has a place; it may still be loading"


class NoReplicaReady(ReplicaDied):
    """Nobody could take the request in time."""

    retry_s = 5.0


class Fleet:
    """All links of one gateway."""

    def __init__(
        self,
        chooser: ReplicaChooser,
        *,
        secret: str,
        wait_s: float,
        routes: Routes | None = None,
        tokenizers: Tokenizers | None = None,
    ) -> None:
        """`wait_s`: how long a request may wait for a replica while none is ready."""
        self.routes = routes or Routes()
        self._chooser = chooser
        self._secret = secret
        self._wait_s = wait_s
        self._links: dict[str, ReplicaLink] = {}
        self._connecting = asyncio.Lock()
        self._meeting: set[asyncio.Task[None]] = set()
        self._giving_back: set[asyncio.Task[None]] = set()
        self._met: ReplicaLink | None = None
        self._tokenizers = tokenizers or Tokenizers()

    @property
    def linked(self) -> int:
        """Replicas with a living link. From any thread."""
        return sum(link.alive for link in tuple(self._links.values()))

    @asynccontextmanager
    async def reserve(
        self, token_ids: Sequence[int] = (), tenant: str = "", send: Send = lambda link: None
    ) -> AsyncIterator[Place]:
        """A place on a living replica, given back at the end: on the best one for this prompt.

        `send` may be called before the place is sure, and again for another replica.
        Raises NoReplicaReady after `wait_s`.
        """
        slot, failures = AsyncExitStack(), deque[QuireError](maxlen=1)
        try:
            async with asyncio.timeout(self._wait_s):
                place = await self._reserve(slot, token_ids, tenant, send, failures)
        except TimeoutError as error:
            reason = failures[0] if failures else _NONE_UP
            raise NoReplicaReady(
                f"no replica was ready within {self._wait_s:g} s: {reason}; try again, or look at "
                "`serve status` and the replica's log"
            ) from error
        try:
            self._meet_unknown()
            yield place
        finally:
            if place.call is not None:
                place.call.close()
            self._give_back(place.route, slot)

    async def known(self) -> ReplicaLink:
        """The replica that was met last; it may be gone. During an upgrade others serve something else.

        Raises NoReplicaReady.
        """
        if self._met is None:
            async with self.reserve() as place:
                return place.link
        return self._met

    def all_read_like(self, link: ReplicaLink) -> bool:
        """Whether nobody who is met serves another model than this replica."""
        return all(other.reads_like(link) for other in self._links.values() if other.alive)

    async def report_lost(self, link: ReplicaLink) -> None:
        """The replica failed a request as dead: pass it over for a while, though Serve may still name it."""
        self.routes.left(link.replica_id, _AVOID_S)
        if self._links.get(link.replica_id) is link:
            del self._links[link.replica_id]
        await link.close()

    async def stats(self) -> list[inference_pb2.ReplicaStats]:
        """Of every replica that answers; one that dies meanwhile is left out."""
        await self.known()  # connects to one at least
        answers = await asyncio.gather(
            *(self._stats_of(link) for link in self._links.values() if link.alive), return_exceptions=True
        )
        return [answer for answer in answers if isinstance(answer, inference_pb2.ReplicaStats)]

    async def _stats_of(self, link: ReplicaLink) -> inference_pb2.ReplicaStats:
        stats = await asyncio.wait_for(link.stats(), _ANSWER_S)
        stats.fingerprint = link.fingerprint
        return stats

    async def close(self) -> None:
        if self._giving_back:
            await asyncio.wait(self._giving_back, timeout=_GIVE_BACK_S)
        for task in self._meeting | self._giving_back:
            task.cancel()
        links, self._links = self._links, {}
        for link in links.values():
            await link.close()

    async def _reserve(
        self,
        slot: AsyncExitStack,
        token_ids: Sequence[int],
        tenant: str,
        send: Send,
        failures: deque[QuireError],
    ) -> Place:
        """`slot` gives the place back. `failures` hears why it takes so long. Raises what no wait mends."""
        while True:
            early, attempt = Early(send, self._links), AsyncExitStack()
            route = self.routes.route(token_ids, tenant, early.ranked)
            with ExitStack() as unless_taken:
                unless_taken.callback(self._give_back, route, attempt)
                unless_taken.callback(early.close)
                chosen = await self._choose(attempt, route, early)
                if chosen is not None and not self.routes.avoids(chosen.replica_id):
                    try:
                        link = await self._link(chosen)
                    except QuireError as error:  # then another one, or this one a little later
                        failures.append(error)
                        self._give_up(chosen.replica_id, error)
                    else:
                        route.reserved(chosen.replica_id)
                        link.tell_place(chosen.place, held=True)
                        slot.callback(link.tell_place, chosen.place, held=False)
                        slot.push_async_exit(attempt.pop_all())
                        unless_taken.pop_all()
                        call = early.taken(link)
                        if call is not None:
                            route.submitted(call.number)  # it may have been ranked elsewhere meanwhile
                        return Place(link, route, call)
            await asyncio.sleep(_PAUSE_S)

    def _give_up(self, replica_id: str, error: QuireError) -> None:
        """On a replica that no wait mends. Raises the error if it is the only one."""
        if isinstance(error, ReplicaDied):
            return
        if not self.linked:
            raise error
        self.routes.left(replica_id, _AVOID_S)

    def _give_back(self, route: Route, slot: AsyncExitStack) -> None:
        """A machine that is gone does not answer this, and the request is to go elsewhere meanwhile."""
        route.ended()
        self._beside(self._giving_back, slot.aclose())

    async def _choose(self, attempt: AsyncExitStack, route: Route, early: Early) -> ReplicaAddress | None:
        """None: the best one was lost while it was asked for a place, and there are others.

        Serve waits until its node is declared dead, and keeps doing so beside us: a place that it is given
        after all, it gives back. Only the best one is watched; of others Serve says nothing.
        """
        entering = asyncio.create_task(attempt.enter_async_context(self._chooser.choose(route)))
        try:
            while not (await asyncio.wait({entering}, timeout=_LOOK_S))[0]:
                if self._best_is_lost(route):
                    return None
            return entering.result()
        finally:
            if not entering.done():
                early.close()
                entering.cancel()
                await asyncio.wait({entering})

    def _best_is_lost(self, route: Route) -> bool:
        self._drop_dead()
        avoids = self.routes.avoids
        return avoids(route.replica_id) and not all(avoids(name) for name in route.candidates)

    def _drop_dead(self) -> None:
        for link in [link for link in self._links.values() if not link.alive]:
            del self._links[link.replica_id]
            self.routes.left(link.replica_id, _AVOID_S)

    def _meet_unknown(self) -> None:
        """Replicas that Serve knows and nobody was sent to yet: whoever is to be chosen must be heard."""
        self._drop_dead()
        for replica_id, address in self.routes.unknown().items():
            if replica_id not in self._links and len(self._meeting) < _MEETINGS:
                self._beside(self._meeting, self._meet(ReplicaAddress(replica_id, address)))

    def _beside(self, tasks: set[asyncio.Task[None]], work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _meet(self, replica: ReplicaAddress) -> None:
        try:
            await self._link(replica)
        except QuireError:  # it is asked again later, beside a request
            self.routes.left(replica.replica_id, _AVOID_S)

    async def _link(self, chosen: ReplicaAddress) -> ReplicaLink:
        link = self._links.get(chosen.replica_id)
        if link is None:
            async with self._connecting:
                link = self._links.get(chosen.replica_id)
                if link is None:
                    link = await ReplicaLink.connect(
                        chosen.address, self._secret, _ANSWER_S, self._tokenizers, self.routes.heard
                    )
                    self._met = link
                    self._links[chosen.replica_id] = link
                    self.routes.joined(chosen.replica_id, link.keys, link.model.page_tokens)
        if not link.alive:
            self._links.pop(chosen.replica_id, None)
            self.routes.left(chosen.replica_id)
            raise ReplicaDied(f"replica {chosen.replica_id} is gone")
        return link
