"""Which replica has the lowest cost for a prompt: a prediction for each, and a choice. Pure.

    TTFT = wait (the work queued there, and the step under way)
         + pressure (until there are pages, and fewer running sequences than max_running)
         + work (compute what is not cached, or fetch it from a peer)
    cost = TTFT + half of the delay that computing the prompt imposes on the sequences running there

All rates are measured by the replicas. A prefix that is requested again while it is still being computed is
likely to be requested by many. Then an idle replica computes it too, if that costs this request no more than
it would save the next one. docs/routing.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from quire.replicas.engine.load_report import LoadReport

STALE_S = 3.0
"""Age at which a load report is ignored: replicas report once a second at least."""
_TIE_S = 0.002
_TIE_SHARE = 0.1
"""Costs that differ by less than this, or by less than this share of the lowest TTFT, count as equal."""
_TYPICAL_BEFORE = 1000
"""Context tokens at which prefill rates are compared."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the cost, found by simulation: docs/lab/performance.md shows what other values lead to."""

    delay: float = 0.5
    """Weight of the delay of running sequences, relative to the TTFT of the request."""


class Reason(StrEnum):
    """Why a replica was chosen."""

    PREFIX = "prefix"  # the lowest cost, and it holds some of the prompt
    LOAD = "load"  # the lowest cost, and it holds nothing of the prompt
    COPY = "copy"  # another replica is computing the prefix, and this one is idle and computes it too
    ONLY = "only"  # there was no other
    BLIND = "blind"  # no rates are known: of two drawn, the one with fewer requests of this gateway
    FALLBACK = "fallback"  # choosing failed, and any replica was taken


@dataclass(frozen=True, slots=True)
class PromptSize:
    """The size of a prompt, and of the blocks that caches share."""

    tokens: int
    page_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What one gateway knows of a replica, for one prompt."""

    replica_id: str
    load: LoadReport | None = None
    """The replica's last load report; None before the first one."""
    age_s: float = 0.0
    """Age of the load report."""
    sent_tokens: int = 0
    """Prompt tokens to compute in requests of this gateway that the load report does not count yet."""
    sent_requests: int = 0
    sent_age_s: float = 0.0
    """Time since the first of those requests was sent."""
    open_requests: int = 0
    """All open requests of this gateway there."""
    chosen: int = 0
    """How often it was chosen recently: ties go to the replica that was chosen less."""
    known_blocks: int = 0
    """Leading blocks of the prompt that it is thought to hold."""
    coming: bool = False
    """Whether most of those blocks are still being computed there for another request."""
    holder_blocks: int = 0
    """Leading blocks of the prompt that it could fetch from a peer; 0 where nothing is shared."""

    @property
    def idle(self) -> bool:
        """Whether the replica is known to have nothing to do."""
        load = self.load
        return load is not None and not (load.running or load.waiting or self.sent_requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The rates of all replicas: the machines of one deployment are alike.

    A single replica may have measured badly, above all at its start. If its own rates were used, it would be
    sent nothing and would never measure again.
    """

    prefill_s_per_token: float
    prefill_s_per_token_before: float
    fetch_s: float
    fetch_s_per_token: float

    def compute_s(self, before: int, tokens: int) -> float:
        """Return the time to prefill `tokens` tokens of a prompt after the first `before`."""
        middle = before + tokens / 2
        return tokens * (self.prefill_s_per_token + self.prefill_s_per_token_before * middle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is predicted for a prompt at one replica."""

    replica_id: str
    wait_s: float
    pressure_s: float
    work_s: float
    others_s: float
    """Weighted delay of the sequences running there."""
    cached_tokens: int
    fetched_tokens: int

    @property
    def first_token_s(self) -> float:
        """The predicted TTFT."""
        return self.wait_s + self.pressure_s + self.work_s

    @property
    def cost_s(self) -> float:
        """The time that the choice minimizes."""
        return self.first_token_s + self.others_s


@dataclass(frozen=True, slots=True)
class Ranking:
    """All replicas, the lowest cost first, and why the first one comes first."""

    order: tuple[str, ...]
    reason: Reason
    best: Prediction | None
    """The prediction for the first replica; None where nothing could be predicted."""


def rank(
    prompt: PromptSize, candidates: Sequence[Candidate], draw: Sequence[float], weights: Weights
) -> Ranking:
    """Order the candidates by cost. `draw`: a random number for each, which breaks the last ties."""
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
    """Predict for one replica. One that has not reported yet is taken to be idle and empty."""
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
    """Return the medians of the measured rates; None if no replica has computed anything yet."""
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
    """Return the idle replica that is to compute a prefix which the first in order is still computing."""
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
    """Return the wait: what was queued when the load was reported, less the work since, and what was sent."""
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
    """Return the seconds of work, and how many tokens are fetched: some only where that is faster."""
    compute_s = rates.compute_s(cached, tokens - cached)
    fetch = fetchable - cached
    if fetch <= 0 or not rates.fetch_s_per_token:
        return compute_s, 0
    fetch_s = rates.fetch_s + fetch * rates.fetch_s_per_token
    fetch_s += rates.compute_s(fetchable, tokens - fetchable)
    return (fetch_s, fetch) if fetch_s < compute_s else (compute_s, 0)


def _of_two(candidates: Sequence[Candidate], draw: Sequence[float]) -> tuple[str, ...]:
    """Order by the power of two choices: of two drawn ones the less busy first, then all others."""
    drawn = [candidates[at] for at in sorted(range(len(candidates)), key=lambda at: draw[at])]
    two = sorted(drawn[:2], key=lambda c: c.open_requests)
    return tuple(c.replica_id for c in [*two, *drawn[2:]])
