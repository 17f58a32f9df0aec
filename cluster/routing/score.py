"""Which replica gives a prompt its first token soonest: a prediction for each, and a choice. Pure.

    time to first token = wait (what is queued there, and the step under way)
                        + pressure (until there are pages and a place)
                        + work (compute what it has not, or fetch that from a neighbour)

All rates are measured by the replicas. The cost of a choice is this time plus half of what the sequences
running there wait while the prompt is computed.

A prefix that is requested again while it is still being computed is likely to be requested by many. Then an
idle replica computes it too, if that costs this request no more than it would save the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from quire.replicas.engine.load_report import LoadReport

STALE_S = 3.0
"""A report so old says nothing any more: replicas report once a second at least."""
_TIE_S = 0.002
_TIE_SHARE = 0.1
"""Costs closer than this, or than this share of the least one's time to first token, are equal."""
_TYPICAL_BEFORE = 1000
"""Tokens behind which paces of prefill are compared."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What was found by simulation: docs/lab/performance.md has what others come to."""

    delay: float = 0.5
    """Of what running sequences wait for a prompt, against what it waits itself."""


class Reason(StrEnum):
    """Why a replica was chosen."""

    PREFIX = "prefix"  # soonest, and it holds some of the prompt
    LOAD = "load"  # soonest, and it holds nothing of the prompt
    COPY = "copy"  # another one computes the prefix just now, and this one is idle and computes it too
    ONLY = "only"  # there was no other
    BLIND = "blind"  # nothing is known: the one with less of this gateway's work, of two drawn
    FALLBACK = "fallback"  # choosing failed, and any was taken


@dataclass(frozen=True, slots=True)
class PromptSize:
    """What is to be computed somewhere."""

    tokens: int
    page_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica, as one gateway knows it."""

    replica_id: str
    load: LoadReport | None = None
    """None: it has not said anything yet."""
    age_s: float = 0.0
    """Of the load."""
    sent_tokens: int = 0
    """Prompt tokens to compute in requests of this gateway that the load does not know of yet."""
    sent_requests: int = 0
    sent_age_s: float = 0.0
    """Since the first of those was sent."""
    open_requests: int = 0
    """Of this gateway, all of them."""
    chosen: int = 0
    """How often, lately: ties go to the one that was chosen less."""
    known_blocks: int = 0
    """Leading blocks of the prompt that it is thought to hold."""
    coming: bool = False
    """Whether most of these are still being computed there, for another request."""
    holder_blocks: int = 0
    """Leading blocks that it could fetch from another replica; 0 where nothing is shared."""

    @property
    def idle(self) -> bool:
        """Whether it is known to have nothing to do."""
        load = self.load
        return load is not None and not (load.running or load.waiting or self.sent_requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How quick the replicas are, all of them: one deployment has like machines.

    A replica by itself may have measured badly, at its start above all. Believed, it would be sent nothing
    and never measure again.
    """

    prefill_s_per_token: float
    prefill_s_per_token_before: float
    fetch_s: float
    fetch_s_per_token: float

    def compute_s(self, before: int, tokens: int) -> float:
        """For so many tokens that stand behind so many others."""
        middle = before + tokens / 2
        return tokens * (self.prefill_s_per_token + self.prefill_s_per_token_before * middle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What would happen at one replica."""

    replica_id: str
    wait_s: float
    pressure_s: float
    work_s: float
    others_s: float
    """What counts of the waiting of running sequences."""
    cached_tokens: int
    fetched_tokens: int

    @property
    def first_token_s(self) -> float:
        return self.wait_s + self.pressure_s + self.work_s

    @property
    def cost_s(self) -> float:
        """What is made small."""
        return self.first_token_s + self.others_s


@dataclass(frozen=True, slots=True)
class Ranking:
    """Replicas, best first, and why the first one is."""

    order: tuple[str, ...]
    reason: Reason
    best: Prediction | None
    """None: nothing could be predicted."""


def rank(
    prompt: PromptSize, candidates: Sequence[Candidate], draw: Sequence[float], weights: Weights
) -> Ranking:
    """`draw`: one random number for each candidate, which breaks what ties remain."""
    if len(candidates) == 1:
        return Ranking((candidates[0].replica_id,), Reason.ONLY, None)
    rates = rates_of([c.load for c in candidates if c.load is not None and c.age_s <= STALE_S])
    if rates is None:
        return Ranking(_of_two(candidates, draw), Reason.BLIND, None)
    heard = [c for c in candidates if c.load is None or c.age_s <= STALE_S]
    silent = [c for c in candidates if c not in heard]  # stalled, or the way to it is: last
    predictions = {c.replica_id: predict(prompt, c, rates, weights) for c in heard}
    least = min(predictions.values(), key=lambda p: p.cost_s)
    equal_s = least.cost_s + max(_TIE_S, _TIE_SHARE * least.first_token_s)

    def place(at: int) -> tuple[bool, float, int, int, float]:
        candidate = heard[at]
        cost_s = predictions[candidate.replica_id].cost_s
        ties = cost_s <= equal_s
        kept = candidate.known_blocks if ties else 0
        return (not ties, 0.0 if ties else cost_s, -kept, candidate.chosen, draw[at])

    order = [heard[at] for at in sorted(range(len(heard)), key=place)]
    best = predictions[order[0].replica_id]
    reason = Reason.PREFIX if best.cached_tokens else Reason.LOAD
    at = _computes_it_too(prompt, order, predictions, rates, weights)
    if at is not None:
        order = [at, *(c for c in order if c is not at)]
        best, reason = predictions[at.replica_id], Reason.COPY
    return Ranking(tuple(c.replica_id for c in order + silent), reason, best)


def predict(prompt: PromptSize, candidate: Candidate, rates: Rates, weights: Weights) -> Prediction:
    """For one replica. One that has not said anything yet is thought to be idle and empty."""
    load = candidate.load or LoadReport(pages_total=1, pages_free=1 << 30, max_running=1 << 30)
    cached = min(candidate.known_blocks * prompt.page_tokens, prompt.tokens - 1)
    fetchable = min(candidate.holder_blocks * prompt.page_tokens, prompt.tokens - 1)
    work_s, fetched = _work(rates, prompt.tokens, cached, fetchable)
    need = -(-prompt.tokens // prompt.page_tokens) - candidate.known_blocks
    had = cached + fetched
    delay_s = load.running * rates.compute_s(had, prompt.tokens - had)
    return Prediction(
        replica_id=candidate.replica_id,
        wait_s=_wait(load, rates, candidate),
        pressure_s=_pressure(load, need, candidate.sent_requests),
        work_s=work_s,
        others_s=weights.delay * delay_s,
        cached_tokens=cached,
        fetched_tokens=fetched,
    )


def rates_of(loads: Sequence[LoadReport]) -> Rates | None:
    """The medians of what was measured; None: nobody has computed anything yet."""
    computed = sorted(
        (load for load in loads if load.prefill_s_per_token),
        key=lambda load: load.prefill_s_per_token + load.prefill_s_per_token_before * _TYPICAL_BEFORE,
    )
    if not computed:
        return None
    fetched = sorted(
        (load for load in loads if load.fetch_s_per_token), key=lambda load: load.fetch_s_per_token
    )
    prefill, fetch = computed[(len(computed) - 1) // 2], fetched[(len(fetched) - 1) // 2] if fetched else None
    return Rates(
        prefill_s_per_token=prefill.prefill_s_per_token,
        prefill_s_per_token_before=prefill.prefill_s_per_token_before,
        fetch_s=fetch.fetch_s if fetch else 0.0,
        fetch_s_per_token=fetch.fetch_s_per_token if fetch else 0.0,
    )


def _computes_it_too(
    prompt: PromptSize,
    order: Sequence[Candidate],
    predictions: Mapping[str, Prediction],
    rates: Rates,
    weights: Weights,
) -> Candidate | None:
    """The idle replica that is to compute a prefix which the first in order is still computing."""
    first = order[0]
    most = max(c.known_blocks for c in order)
    holders = [c for c in order if c.known_blocks == most]
    if not most or first not in holders or not all(c.coming for c in holders):
        return None
    with_it_s = {
        at: predict(prompt, replace(c, known_blocks=most), rates, weights).cost_s
        for at, c in enumerate(order)
        if c.known_blocks < most and c.idle
    }
    if not with_it_s:
        return None
    at = min(with_it_s, key=with_it_s.__getitem__)
    saves_s = predictions[first.replica_id].cost_s - with_it_s[at]
    costs_s = predictions[order[at].replica_id].cost_s - predictions[first.replica_id].cost_s
    return order[at] if saves_s > 0 and costs_s <= saves_s else None


def _wait(load: LoadReport, rates: Rates, candidate: Candidate) -> float:
    """What was queued when the load was told has been worked on since, then what was sent."""
    queued_s = load.queued_tokens * rates.prefill_s_per_token - candidate.age_s
    worked_s = min(candidate.sent_age_s, max(-queued_s, 0.0))
    sent_s = max(candidate.sent_tokens * rates.prefill_s_per_token - worked_s, 0.0)
    busy = load.running or load.waiting or candidate.sent_requests
    return max(queued_s, 0.0) + sent_s + (load.step_s / 2 if busy else 0.0)


def _pressure(load: LoadReport, need_pages: int, sent_requests: int) -> float:
    """Running sequences end evenly over the time they hold their pages."""
    if not load.running:
        return 0.0
    before = load.waiting + sent_requests
    places = max(load.running + before + 1 - load.max_running, 0) / load.running
    used = max(load.pages_total - load.pages_free - load.pages_cached, 1)
    pages = max(need_pages - load.pages_free - load.pages_cached, 0) / used
    return load.hold_s * max(places, pages)


def _work(rates: Rates, tokens: int, cached: int, fetchable: int) -> tuple[float, int]:
    """Seconds, and how many tokens are fetched for it, which the replica does only where it is sooner."""
    compute_s = rates.compute_s(cached, tokens - cached)
    fetch = fetchable - cached
    if fetch <= 0 or not rates.fetch_s_per_token:
        return compute_s, 0
    fetch_s = rates.fetch_s + fetch * rates.fetch_s_per_token
    fetch_s += rates.compute_s(fetchable, tokens - fetchable)
    return (fetch_s, fetch) if fetch_s < compute_s else (compute_s, 0)


def _of_two(candidates: Sequence[Candidate], draw: Sequence[float]) -> tuple[str, ...]:
    """Power of two choices: of two drawn ones the less busy first, then all others."""
    drawn = [candidates[at] for at in sorted(range(len(candidates)), key=lambda at: draw[at])]
    two = sorted(drawn[:2], key=lambda c: c.open_requests)
    return tuple(c.replica_id for c in [*two, *drawn[2:]])
