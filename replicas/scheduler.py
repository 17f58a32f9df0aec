"""Which sequences the next step advances, and by how many tokens.

Pure: values in, a value out; no clock, lock, tensor or pool. `engine.py` carries the plan out.

Decoding sequences go first, then the chunks of prompts, both in order of priority and arrival, up to a
token budget. When pages run short, the least important sequence gives its pages back and waits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

SeqId = NewType("SeqId", int)


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that holds pages."""

    id: SeqId
    priority: int
    tokens: int
    """Known tokens: prompt and output so far."""
    computed: int
    """How many of them have their KV in pages."""
    pages: int
    """Pages it holds."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence that holds nothing yet, or nothing any more."""

    id: SeqId
    priority: int
    tokens: int
    cached_pages: int
    """Leading full blocks found in the pool; they need not be computed."""
    idle_pages: int
    """How many of those nobody uses: taking them makes them unavailable to others."""


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """Both lists in order of arrival."""

    running: Sequence[Running]
    waiting: Sequence[Waiting]
    available_pages: int
    """Free pages and pages of unused cached blocks."""
    page_tokens: int
    max_running: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the next `tokens` tokens of a sequence."""

    id: SeqId
    tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Carried out in this order: preempt, admit, work."""

    preempt: tuple[SeqId, ...]
    admit: tuple[SeqId, ...]
    work: tuple[Work, ...]
    """Fewest tokens first."""


def plan_step(state: SchedulerState) -> StepPlan:
    """Plan one step. Every page the plan needs is available if it is carried out in order.

    The one exception: pages that a preempted sequence shares with others do not come back. Work that then
    finds too few pages is left out by whoever carries the plan out, and planned anew.
    """
    budget, pages = state.max_step_tokens, state.available_pages
    work: dict[SeqId, int] = {}
    holding = {r.id: r for r in sorted(state.running, key=lambda r: -r.priority)}  # stable: arrival
    preempted: list[SeqId] = []
    order = sorted(holding.values(), key=lambda r: r.tokens - r.computed > 1)  # decoding first
    for seq in order:
        if seq.id not in holding:
            continue
        tokens = min(seq.tokens - seq.computed, budget)
        need = _pages(seq.computed + tokens, state.page_tokens) - seq.pages
        while need > pages and seq.id in holding:
            victim = holding.popitem()[1]
            preempted.append(victim.id)
            budget += work.get(victim.id, 0)
            pages += victim.pages + _planned_pages(victim, work.pop(victim.id, 0), state.page_tokens)
        if seq.id in holding and tokens > 0:
            work[seq.id] = tokens
            budget -= tokens
            pages -= need
    admitted = [] if preempted else _admit(state, holding, work, budget, pages)
    tokens_of = work | {w.id: w.tokens for w in admitted}
    return StepPlan(
        preempt=tuple(preempted),
        admit=tuple(w.id for w in admitted),
        work=tuple(Work(i, n) for i, n in sorted(tokens_of.items(), key=lambda item: item[1])),
    )


def _admit(
    state: SchedulerState, holding: dict[SeqId, Running], work: dict[SeqId, int], budget: int, pages: int
) -> list[Work]:
    """Admit from the head of the queue while all known tokens of all admitted sequences fit the pool."""
    promised = sum(
        _pages(seq.tokens, state.page_tokens) - _pages(seq.computed + work.get(seq.id, 0), state.page_tokens)
        for seq in holding.values()
        if seq.id in work or seq.tokens > seq.computed
    )
    admitted: list[Work] = []
    for seq in sorted(state.waiting, key=lambda w: -w.priority):
        need = _pages(seq.tokens, state.page_tokens) - seq.cached_pages + seq.idle_pages
        full = len(holding) + len(admitted) >= state.max_running
        if full or budget < 1 or need > pages - promised:
            break
        tokens = min(seq.tokens - seq.cached_pages * state.page_tokens, budget)
        admitted.append(Work(seq.id, tokens))
        budget -= tokens
        pages -= need
    return admitted


def _planned_pages(seq: Running, tokens: int, page_tokens: int) -> int:
    """Pages the plan had set aside for a sequence's work in this step."""
    return max(_pages(seq.computed + tokens, page_tokens) - seq.pages, 0) if tokens else 0


def _pages(tokens: int, page_tokens: int) -> int:
    return -(-tokens // page_tokens)
