"""What one gateway knows of its replicas, and where it sends its requests. Knows no Ray.

`Routes` hears the replicas' loads and remembers what was sent where; a `Route` is one request's way: ranked,
reserved, submitted, answered, ended. Serve's router ranks on its own thread, all else happens on the
gateway's: one lock, held for microseconds.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

from quire.cluster.routing.prefixes import MAX_BLOCKS, KnownBlocks
from quire.cluster.routing.score import Candidate, Prediction, Prompt, Reason, Weights, rank
from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.replicas.engine.load_report import LoadReport

_BLOCKS_BEFORE_A_REPORT = 4096
_CHOSEN_MEMORY = 0.9
"""How much of `chosen` is left when another choice is made."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request went, and why."""

    replica_id: str
    reason: Reason
    candidates: int
    predicted: Prediction | None
    """For that replica, when the request came."""
    scoring_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingNumbers:
    """What a gateway's choices come to. Counters since its start, but for the last."""

    decisions: Mapping[Reason, int]
    scoring_s: float
    predicted: int
    """Requests that were answered and for which a time was predicted."""
    predicted_first_token_s: float
    """Summed over those, and so are the next two."""
    actual_first_token_s: float
    """From the choice on."""
    error_s: float
    """How far predictions were off, up or down."""
    expected_cached_tokens: int
    known_blocks: int
    """That replicas are thought to hold, now."""


@dataclass(slots=True)
class _Known:
    """One replica."""

    blocks: KnownBlocks
    address: str = ""
    keys: KeySpace | None = None
    load: LoadReport | None = None
    heard_s: float = 0.0
    seen_call: int = 0
    open: set[Route] = field(default_factory=set)
    chosen: float = 0.0
    avoid_until_s: float = 0.0
    lost: bool = False
    """It failed as dead and was not met since."""


class Route:
    """One request's way. `Routes.route` makes it; Serve's router asks it to `rank`."""

    def __init__(self, routes: Routes, token_ids: Sequence[int], tenant: str, ranked: Ranked | None) -> None:
        self._routes, self._ranked = routes, ranked
        self.token_ids, self.tenant = token_ids, tenant
        self.candidates: dict[str, Candidate] = {}
        self.reason = Reason.FALLBACK
        self.best: Prediction | None = None
        self.prediction: Prediction | None = None
        self.replica_id = ""
        self.call = 0
        self.chosen_s = 0.0
        self.scoring_s = 0.0
        self.known_blocks = self.cold_tokens = 0
        """What the replica was thought to hold of it, and what is to be computed there."""
        self.waits = False
        """Whether its first token is still to come."""
        self.over = False
        """Serve may rank it still, if it was given up while a place was asked for: it counts nowhere."""
        self.chains: dict[KeySpace, list[BlockKey]] = {}

    def rank(self, replicas: Mapping[str, str]) -> tuple[str, ...]:
        """Ids of these replicas (id to address), best first; the request counts at the first from now on."""
        order = self._routes.rank(self, replicas)
        if self._ranked is not None and not self.over:
            candidate = self.candidates.get(order[0])
            self._ranked(self, order[0], candidate is not None and candidate.has_room)
        return order

    def reserved(self, replica_id: str) -> None:
        """Serve has reserved a place there: at the best one, or where there was one."""
        self._routes.reserved(self, replica_id)

    def submitted(self, call: int) -> None:
        """It is under way, under this number on the replica's stream."""
        self.call = call

    def answered(self) -> None:
        """Its first token has come."""
        if self.waits:
            self._routes.answered(self)

    def ended(self, output_ids: Sequence[int] = ()) -> None:
        """It is over. `output_ids`: tokens of its only output, which the replica holds as well now."""
        self._routes.ended(self, output_ids)

    @property
    def decision(self) -> Decision | None:
        """None before a place was reserved."""
        if not self.replica_id:
            return None
        return Decision(self.replica_id, self.reason, len(self.candidates), self.prediction, self.scoring_s)


Ranked = Callable[[Route, str, bool], None]
"""A request's way, the best replica, and whether that is known to have room for it."""


class Routes:
    """All of one gateway."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._clock, self._weights = clock, weights or Weights()
        self._random = random.Random(seed)
        self._lock = Lock()
        self._replicas: dict[str, _Known] = {}
        self._page_tokens = 0
        self._decisions: Counter[Reason] = Counter()
        self._scoring_s = self._predicted_s = self._actual_s = self._error_s = 0.0
        self._predicted = self._expected_cached = 0

    def route(
        self,
        token_ids: Sequence[int] = (),
        tenant: str = "",
        ranked: Ranked | None = None,
    ) -> Route:
        """A request's way, for its prompt. `ranked` is called whenever it was, on the thread that did it."""
        return Route(self, token_ids, tenant, ranked)

    def numbers(self) -> RoutingNumbers:
        """From any thread."""
        with self._lock:
            return RoutingNumbers(
                decisions={reason: self._decisions[reason] for reason in Reason},
                scoring_s=self._scoring_s,
                predicted=self._predicted,
                predicted_first_token_s=self._predicted_s,
                actual_first_token_s=self._actual_s,
                error_s=self._error_s,
                expected_cached_tokens=self._expected_cached,
                known_blocks=sum(len(known.blocks) for known in self._replicas.values()),
            )

    # ---- what replicas say

    def joined(self, replica_id: str, keys: KeySpace, page_tokens: int) -> None:
        """The gateway has a stream to it."""
        with self._lock:
            known = self._known(replica_id)
            known.keys, known.lost = keys, False
            self._page_tokens = page_tokens

    def heard(self, replica_id: str, load: LoadReport, seen_call: int) -> None:
        """How busy it is; it knows of this gateway's calls up to `seen_call`."""
        with self._lock:
            known = self._known(replica_id)
            known.load, known.heard_s, known.seen_call = load, self._clock(), seen_call
            most = MAX_BLOCKS // len(self._replicas)
            known.blocks.resize(min(load.pages_total + load.host_slots, most))

    def left(self, replica_id: str, avoid_s: float = 0.0) -> None:
        """The stream has ended: what is known of it is so no more. With `avoid_s` it is ranked last: for so
        long, and until it is met again.
        """
        with self._lock:
            if (known := self._replicas.get(replica_id)) is not None:
                self._replicas[replica_id] = _Known(
                    KnownBlocks(_BLOCKS_BEFORE_A_REPORT),
                    known.address,
                    open=known.open,
                    avoid_until_s=max(known.avoid_until_s, self._clock() + avoid_s),
                    lost=known.lost or avoid_s > 0,
                )

    def avoids(self, replica_id: str) -> bool:
        """Whether it failed a moment ago."""
        with self._lock:
            known = self._replicas.get(replica_id)
            return known is not None and known.avoid_until_s > self._clock()

    def unknown(self) -> dict[str, str]:
        """Replicas (id to address) that requests were ranked over and that the gateway has no stream to."""
        now_s = self._clock()
        with self._lock:
            return {
                name: known.address
                for name, known in self._replicas.items()
                if known.keys is None and known.address and known.avoid_until_s <= now_s
            }

    # ---- a request's way

    def rank(self, route: Route, replicas: Mapping[str, str]) -> tuple[str, ...]:
        """See `Route.rank`."""
        began_s = self._clock()
        with self._lock:
            if route.over:
                return tuple(replicas)
            self._keep(replicas)
            known = self._replicas
            wanted = [n for n in replicas if not known[n].lost and known[n].avoid_until_s <= began_s]
            names = wanted or list(replicas)
            route.candidates = {c.replica_id: c for c in self._candidates(route, names, began_s)}
            prompt = Prompt(len(route.token_ids), self._page_tokens or 1)
            draw = [self._random.random() for _ in names]
            ranking = rank(prompt, list(route.candidates.values()), draw, self._weights)
            route.reason, route.best = ranking.reason, ranking.best
            order = (*ranking.order, *(name for name in replicas if name not in names))
            self._count_at(route, order[0])
            route.scoring_s = self._clock() - began_s
            return order

    def reserved(self, route: Route, replica_id: str) -> None:
        """See `Route.reserved`."""
        with self._lock:
            if route.replica_id != replica_id:
                self._count_at(route, replica_id)
            best = route.best
            route.prediction = best if best and best.replica_id == replica_id else None
            for known in self._replicas.values():
                known.chosen *= _CHOSEN_MEMORY
            known = self._known(replica_id)
            known.chosen += 1
            known.blocks.used(self._chain(route, known))
            self._decisions[route.reason] += 1
            self._scoring_s += route.scoring_s
            self._expected_cached += route.prediction.cached_tokens if route.prediction else 0

    def answered(self, route: Route) -> None:
        """See `Route.answered`."""
        with self._lock:
            route.waits = False
            if route.prediction is not None:
                actual_s, predicted_s = self._clock() - route.chosen_s, route.prediction.first_token_s
                self._predicted += 1
                self._predicted_s += predicted_s
                self._actual_s += actual_s
                self._error_s += abs(actual_s - predicted_s)

    def ended(self, route: Route, output_ids: Sequence[int]) -> None:
        """See `Route.ended`."""
        with self._lock:
            route.over = True
            known = self._replicas.get(route.replica_id)
            if known is None:
                return
            known.open.discard(route)
            if output_ids and known.keys is not None:
                chain = self._chain(route, known)
                parent = chain[-1] if chain else known.keys.root(route.tenant)
                rest = [*route.token_ids[len(chain) * self._page_tokens :], *output_ids]
                known.blocks.used([*chain, *extend_chain(parent, rest[:-1], self._page_tokens)])

    # ---- under the lock

    def _known(self, replica_id: str) -> _Known:
        if replica_id not in self._replicas:
            self._replicas[replica_id] = _Known(KnownBlocks(_BLOCKS_BEFORE_A_REPORT))
        return self._replicas[replica_id]

    def _keep(self, replicas: Mapping[str, str]) -> None:
        """Serve knows these and no others; those keep their books while requests are open there."""
        for name, address in replicas.items():
            self._known(name).address = address
        if len(self._replicas) > len(replicas):
            gone = [name for name, known in self._replicas.items() if name not in replicas and not known.open]
            for name in gone:
                del self._replicas[name]

    def _chain(self, route: Route, known: _Known) -> list[BlockKey]:
        """Keys of the prompt's blocks that can be found: one token at least is always computed."""
        if known.keys is None or not route.token_ids:
            return []
        if known.keys not in route.chains:
            found = (len(route.token_ids) - 1) // self._page_tokens * self._page_tokens
            root = known.keys.root(route.tenant)
            route.chains[known.keys] = extend_chain(root, route.token_ids[:found], self._page_tokens)
        return route.chains[known.keys]

    def _candidates(self, route: Route, names: Sequence[str], now_s: float) -> Iterable[Candidate]:
        alone = len(names) == 1
        held: dict[str, int] = {}
        for name in names:
            known = self._replicas[name]
            held[name] = 0 if alone else known.blocks.match(self._chain(route, known))
        for name in names:
            known = self._replicas[name]
            others = known.open - {route}  # it may have been ranked before
            later = [r for r in others if r.waits and (not r.call or r.call > known.seen_call)]
            shared = known.load is not None and known.load.fetch_s_per_token
            yield Candidate(
                replica_id=name,
                load=known.load,
                age_s=now_s - known.heard_s if known.load else 0.0,
                sent_tokens=sum(r.cold_tokens for r in later),
                sent_requests=len(later),
                sent_age_s=now_s - min((r.chosen_s for r in later), default=now_s),
                open_requests=len(others),
                chosen=round(known.chosen),
                known_blocks=held[name],
                coming=self._coming(route, known, held[name]),
                holder_blocks=max(held.values()) if shared else 0,
            )

    def _coming(self, route: Route, known: _Known, held: int) -> bool:
        """Whether most of the `held` blocks that the replica is to have are being computed for another."""
        last = self._chain(route, known)[held - 1 : held]
        return any(
            other is not route
            and other.waits
            and 2 * other.known_blocks < held
            and self._chain(other, known)[held - 1 : held] == last
            for other in known.open
        )

    def _count_at(self, route: Route, replica_id: str) -> None:
        """From now on the request is work of this replica and of no other."""
        if (before := self._replicas.get(route.replica_id)) is not None:
            before.open.discard(route)
        if route.replica_id != replica_id:
            route.call = 0
        route.replica_id, route.chosen_s, route.waits = replica_id, self._clock(), True
        candidate = route.candidates.get(replica_id)
        route.known_blocks = candidate.known_blocks if candidate else 0
        route.cold_tokens = len(route.token_ids) - route.known_blocks * self._page_tokens
        self._known(replica_id).open.add(route)
