"""What one gateway knows of its replicas, and which of its requests are where. Knows no Ray.

    request = RoutedRequest(token_ids, tenant)
    table.choose(request)      # the request counts at that replica from now on
    request.call = ...         # its number on the replica's stream, once it is sent
    table.answered(request)    # its first token has arrived
    table.ended(request, ids)  # it counts nowhere

All of it happens on the gateway's event loop; only `numbers` may be read from other threads.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from quire.cluster.routing.prefixes import MAX_BLOCKS, KnownBlocks
from quire.cluster.routing.score import Candidate, Prediction, PromptSize, Ranking, Reason, Weights, rank
from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.replicas.engine.load_report import LoadReport

_BLOCKS_BEFORE_A_REPORT = 4096
_CHOSEN_MEMORY = 0.9
"""Each choice multiplies the earlier ones by this, so that `_Replica.chosen` counts the recent ones."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request went, and why."""

    replica_id: str
    reason: Reason
    candidates: int
    predicted: Prediction | None
    """What was predicted for that replica when it was chosen; None where nothing could be."""
    scoring_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingNumbers:
    """Counters of a gateway's choices since its start, and one gauge."""

    decisions: Mapping[Reason, int]
    scoring_s: float
    predicted: int
    """Requests that were answered and for which a time to first token (TTFT) was predicted."""
    predicted_first_token_s: float
    """Sum of the predicted TTFTs of those requests; the next two are sums over them as well."""
    actual_first_token_s: float
    """Sum of the measured TTFTs, from the choice of a replica on."""
    error_s: float
    """Sum of the absolute errors of the predictions."""
    expected_cached_tokens: int
    known_blocks: int
    """Gauge: blocks that the replicas are thought to hold."""


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """One attempt of a request: its prompt, and where the table has it."""

    token_ids: Sequence[int] = ()
    tenant: str = ""
    decision: Decision | None = None
    """Set when a replica is chosen."""
    call: int = 0
    """The request's number on the replica's stream; 0 before it is sent."""
    chosen_s: float = 0.0
    known_blocks: int = 0
    """Leading blocks of the prompt that the replica was thought to hold."""
    cold_tokens: int = 0
    """Tokens of the prompt that are to be computed there."""
    awaiting_first_token: bool = False
    chains: dict[KeySpace, list[BlockKey]] = field(default_factory=dict)
    """The keys of the prompt's blocks, computed once for each version of the model."""


@dataclass(slots=True)
class _Replica:
    """A replica that the gateway has a stream to."""

    keys: KeySpace
    blocks: KnownBlocks = field(default_factory=lambda: KnownBlocks(_BLOCKS_BEFORE_A_REPORT))
    load: LoadReport | None = None
    heard_s: float = 0.0
    seen_call: int = 0
    open: set[RoutedRequest] = field(default_factory=set)
    chosen: float = 0.0
    draining: bool = False


class ReplicaTable:
    """All replicas that one gateway has a stream to, and its requests there."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._clock, self._weights = clock, weights or Weights()
        self._random = random.Random(seed)
        self._replicas: dict[str, _Replica] = {}
        self._listed: Collection[str] | None = None
        self._page_tokens = 1
        self._decisions: Counter[Reason] = Counter()
        self._scoring_s = self._predicted_s = self._actual_s = self._error_s = 0.0
        self._predicted = self._expected_cached = 0

    def numbers(self) -> RoutingNumbers:
        """Return the counters so far. May be called from any thread."""
        return RoutingNumbers(
            decisions={reason: self._decisions[reason] for reason in Reason},
            scoring_s=self._scoring_s,
            predicted=self._predicted,
            predicted_first_token_s=self._predicted_s,
            actual_first_token_s=self._actual_s,
            error_s=self._error_s,
            expected_cached_tokens=self._expected_cached,
            known_blocks=sum(len(replica.blocks) for replica in tuple(self._replicas.values())),
        )

    # ---- what Serve and the replicas say

    def listed(self, replica_ids: Collection[str]) -> None:
        """Choose only among these from now on: the replicas that Serve says are running."""
        self._listed = replica_ids

    def connected(self, replica_id: str, keys: KeySpace, page_tokens: int) -> None:
        """Note that the gateway has a stream to this replica."""
        self._replicas[replica_id] = _Replica(keys)
        self._page_tokens = page_tokens

    def heard(self, replica_id: str, load: LoadReport, seen_call: int) -> None:
        """Note a replica's load report, which counts this gateway's calls up to `seen_call`."""
        if (replica := self._replicas.get(replica_id)) is not None:
            replica.load, replica.heard_s, replica.seen_call = load, self._clock(), seen_call
            most = MAX_BLOCKS // len(self._replicas)
            replica.blocks.resize(min(load.pages_total + load.host_slots, most))

    def draining(self, replica_id: str) -> None:
        """Note that the replica takes no new requests."""
        if (replica := self._replicas.get(replica_id)) is not None:
            replica.draining = True

    def disconnected(self, replica_id: str) -> None:
        """Forget all about a replica whose stream has ended."""
        self._replicas.pop(replica_id, None)

    # ---- a request's way

    def candidates(self, without: Collection[str] = ()) -> list[str]:
        """Return the ids of the replicas that a request may go to."""
        return [
            name
            for name, replica in self._replicas.items()
            if not replica.draining and name not in without and (self._listed is None or name in self._listed)
        ]

    def choose(self, request: RoutedRequest, without: Collection[str] = ()) -> str | None:
        """Choose the replica with the lowest cost and count the request there; None without a candidate."""
        began_s = self._clock()
        names = self.candidates(without)
        if not names:
            return None
        candidates = list(self._scored(request, names, began_s))
        ranking = self._rank(request, candidates)
        chosen = next(c for c in candidates if c.replica_id == ranking.order[0])
        decision = Decision(
            replica_id=chosen.replica_id,
            reason=ranking.reason,
            candidates=len(names),
            predicted=ranking.best,
            scoring_s=self._clock() - began_s,
        )
        request.decision, request.chosen_s, request.awaiting_first_token = decision, began_s, True
        request.known_blocks = chosen.known_blocks
        request.cold_tokens = len(request.token_ids) - chosen.known_blocks * self._page_tokens
        self._count(request, decision)
        return chosen.replica_id

    def answered(self, request: RoutedRequest) -> None:
        """Note that the request's first token has arrived; later calls have no effect."""
        if not request.awaiting_first_token:
            return
        request.awaiting_first_token = False
        if request.decision is not None and (prediction := request.decision.predicted) is not None:
            actual_s = self._clock() - request.chosen_s
            self._predicted += 1
            self._predicted_s += prediction.first_token_s
            self._actual_s += actual_s
            self._error_s += abs(actual_s - prediction.first_token_s)

    def ended(self, request: RoutedRequest, output_ids: Sequence[int] = ()) -> None:
        """Count the request no more. `output_ids`: its output, whose blocks the replica now holds as well."""
        replica = self._replicas.get(request.decision.replica_id) if request.decision else None
        if replica is None:
            return
        replica.open.discard(request)
        if output_ids:
            chain = self._chain(request, replica)
            parent = chain[-1] if chain else replica.keys.root(request.tenant)
            rest = [*request.token_ids[len(chain) * self._page_tokens :], *output_ids]
            replica.blocks.used([*chain, *extend_chain(parent, rest[:-1], self._page_tokens)])

    # ---- inside

    def _rank(self, request: RoutedRequest, candidates: Sequence[Candidate]) -> Ranking:
        size = PromptSize(len(request.token_ids), self._page_tokens)
        draw = [self._random.random() for _ in candidates]
        try:
            return rank(size, candidates, draw, self._weights)
        except Exception:  # whatever the reason, any replica can answer the request
            log.exception("choosing a replica failed; taking any")
            return Ranking((self._random.choice(candidates).replica_id,), Reason.FALLBACK, None)

    def _count(self, request: RoutedRequest, decision: Decision) -> None:
        for replica in self._replicas.values():
            replica.chosen *= _CHOSEN_MEMORY
        replica = self._replicas[decision.replica_id]
        replica.chosen += 1
        replica.open.add(request)
        replica.blocks.used(self._chain(request, replica))
        self._decisions[decision.reason] += 1
        self._scoring_s += decision.scoring_s
        self._expected_cached += decision.predicted.cached_tokens if decision.predicted else 0

    def _chain(self, request: RoutedRequest, replica: _Replica) -> list[BlockKey]:
        """Return the keys of the prompt's blocks that can be found: one token at least is always computed."""
        if not request.token_ids:
            return []
        if replica.keys not in request.chains:
            found = (len(request.token_ids) - 1) // self._page_tokens * self._page_tokens
            root = replica.keys.root(request.tenant)
            request.chains[replica.keys] = extend_chain(root, request.token_ids[:found], self._page_tokens)
        return request.chains[replica.keys]

    def _scored(self, request: RoutedRequest, names: Sequence[str], now_s: float) -> Iterator[Candidate]:
        replicas = {name: self._replicas[name] for name in names}
        alone = len(names) == 1
        known = {
            name: 0 if alone else replica.blocks.match(self._chain(request, replica))
            for name, replica in replicas.items()
        }
        most_known = max(known.values())
        for name, replica in replicas.items():
            load = replica.load
            unseen = [
                r for r in replica.open if r.awaiting_first_token and not 0 < r.call <= replica.seen_call
            ]
            yield Candidate(
                replica_id=name,
                load=load,
                age_s=now_s - replica.heard_s if load else 0.0,
                sent_tokens=sum(r.cold_tokens for r in unseen),
                sent_requests=len(unseen),
                sent_age_s=now_s - min((r.chosen_s for r in unseen), default=now_s),
                open_requests=len(replica.open),
                chosen=round(replica.chosen),
                known_blocks=known[name],
                coming=self._coming(request, replica, known[name]),
                holder_blocks=most_known if load is not None and load.fetch_s_per_token else 0,
            )

    def _coming(self, request: RoutedRequest, replica: _Replica, known: int) -> bool:
        """Return whether most of the `known` blocks are still being computed there for another request."""
        last = self._chain(request, replica)[known - 1 : known]
        return any(
            other.awaiting_first_token
            and 2 * other.known_blocks < known
            and self._chain(other, replica)[known - 1 : known] == last
            for other in replica.open
        )
