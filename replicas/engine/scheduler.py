"""Which sequences the next step advances, and by how many tokens.

Pure: values in, a value out; no clock, lock, tensor or pool. `engine.py` executes the plan.

**Order.** Higher priority first, then earlier arrival. Slots and pages are granted in this order. A waiting
sequence may take them from running ones of lower priority, which then wait again. A sequence that
`MAX_OVERTAKEN` later arrivals have overtaken is overdue: it comes before all that are not, in order of
arrival, and is not preempted for them.

**Budget.** Each decoding sequence gets its one token. A quarter of the remaining token budget goes to the
oldest prompt. The rest goes by priority, and within a priority to the prompts with the fewest tokens left to
compute, so that short prompts pass long ones.

**Bound.** Nothing starves, whatever arrives: a sequence is overtaken at most `MAX_OVERTAKEN` times, and the
oldest prompt of n tokens is computed within 4 n / budget steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NewType, TypeVar

SeqId = NewType("SeqId", int)
"""An increasing number: of two sequences, the one with the smaller id arrived earlier."""

MAX_OVERTAKEN = 64
"""The most later arrivals that may be admitted before a waiting sequence."""

_OLDEST_PROMPT_SHARE = 4
"""The oldest prompt gets one part in this many of the prompts' budget."""


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that holds pages."""

    id: SeqId
    priority: int
    tokens: int
    """Number of known tokens: prompt and output so far."""
    computed: int
    """Number of those whose KV is in pages."""
    pages: int
    """Number of pages it holds."""
    overdue: bool = False

    @property
    def left(self) -> int:
        """Count known tokens that are not computed yet; a decoding sequence has one."""
        return self.tokens - self.computed


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence that holds no pages: it is new, or was preempted."""

    id: SeqId
    priority: int
    tokens: int
    cached_pages: int = 0
    """Number of leading full blocks found in the pool, which need not be computed."""
    idle_pages: int = 0
    """Number of those that are unused: taking them makes them unavailable to other sequences."""
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """The inputs of a plan."""

    running: Sequence[Running]
    waiting: Sequence[Waiting]
    available_pages: int
    """Number of free pages and pages of unused cached blocks."""
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
    """A plan, executed in this order: preempt, admit, work."""

    preempt: tuple[SeqId, ...]
    admit: tuple[SeqId, ...]
    work: tuple[Work, ...]
    """Work in order of its tokens, fewest first."""


class Prompt(NamedTuple):
    """The rest of a prompt. Sorts in the order in which prompts get a step's budget."""

    minus_priority: int
    left: int
    """Number of tokens to compute."""
    id: SeqId


_Either = TypeVar("_Either", Running, Waiting)


def plan_step(state: SchedulerState) -> StepPlan:
    """Plan one step. Every page that the plan needs is available if it is executed in order.

    Except that a preempted sequence does not free pages it shares with others: the engine leaves out work
    that then finds too few pages, and plans it again.
    """
    books = _Books(state)
    for seq in books.in_order():
        if seq.left == 1:
            books.grow(seq, 1)
    if not books.preempted:
        books.admit(candidates(state))
    prompts = [seq for seq in books.in_order() if seq.left and seq.id not in books.work]
    left = [Prompt(-seq.priority, seq.left, seq.id) for seq in prompts]
    shares = share_budget(left, state.max_step_tokens - len(books.work))
    for seq in prompts:
        if shares[seq.id]:
            books.grow(seq, shares[seq.id])
    return StepPlan(
        preempt=tuple(books.preempted),
        admit=tuple(seq_id for seq_id in books.admitted if seq_id in books.work),
        work=tuple(Work(i, n) for i, n in sorted(books.work.items(), key=lambda item: item[1])),
    )


def candidates(state: SchedulerState) -> list[Waiting]:
    """Return the waiting sequences that the step's budget would reach, most important first.

    The others need no slot yet; once they are admitted, more of their blocks may be in the pool.
    """
    decoding = sum(seq.left == 1 for seq in state.running)
    left = [Prompt(-seq.priority, seq.left, seq.id) for seq in state.running if seq.left > 1]
    for waits in state.waiting:
        found = waits.cached_pages * state.page_tokens
        left.append(Prompt(-waits.priority, waits.tokens - found, waits.id))
    shares = share_budget(left, state.max_step_tokens - decoding)
    return by_importance(seq for seq in state.waiting if shares[seq.id])


def share_budget(prompts: Sequence[Prompt], budget: int) -> dict[SeqId, int]:
    """Share `budget` tokens among prompts by the rule at the top of this file."""
    shares = dict.fromkeys((prompt.id for prompt in prompts), 0)
    if not prompts:
        return shares
    oldest = min(prompts, key=lambda prompt: prompt.id)
    shares[oldest.id] = min(oldest.left, -(-budget // _OLDEST_PROMPT_SHARE))
    budget -= shares[oldest.id]
    for _, left, seq_id in sorted(prompts):
        more = min(left - shares[seq_id], budget)
        shares[seq_id] += more
        budget -= more
    return shares


def by_importance(sequences: Iterable[_Either]) -> list[_Either]:
    """Sort by the order in which slots and pages are granted."""
    return sorted(sequences, key=lambda seq: (not seq.overdue, 0 if seq.overdue else -seq.priority, seq.id))


class _Books:
    """Slots and pages while a plan is made."""

    def __init__(self, state: SchedulerState) -> None:
        self._page_tokens, self._slots = state.page_tokens, state.max_running
        self._pages = state.available_pages
        self._holding = {seq.id: seq for seq in state.running}
        self.work: dict[SeqId, int] = {}
        self.preempted: list[SeqId] = []
        self.admitted: list[SeqId] = []

    def in_order(self) -> list[Running]:
        """Return the sequences that hold pages, most important first."""
        return by_importance(self._holding.values())

    def grow(self, seq: Running, tokens: int) -> None:
        """Plan the sequence's next tokens; if pages run short, the least important sequence is preempted."""
        while seq.id in self._holding:
            need = self._count(seq.computed + tokens) - seq.pages
            if need <= self._pages:
                self.work[seq.id] = tokens
                self._pages -= need
                return
            self._preempt(self.in_order()[-1])

    def admit(self, waiting: Iterable[Waiting]) -> None:
        """Admit in order while slots are free and all known tokens of all sequences fit the pool."""
        free = self._pages - sum(self._claim(seq) - self._held(seq) for seq in self._holding.values())
        for seq in waiting:
            need = self._count(seq.tokens) - seq.cached_pages + seq.idle_pages
            victims = self._victims(seq, need - free)
            if victims is None:
                break
            for victim in victims:
                self._preempt(victim)
                free += self._claim(victim)
            free -= need
            self._pages -= seq.idle_pages
            found = seq.cached_pages * self._page_tokens  # the blocks that were found are taken now
            self._holding[seq.id] = Running(
                seq.id, seq.priority, seq.tokens, found, seq.cached_pages, seq.overdue
            )
            self.admitted.append(seq.id)

    def _victims(self, seq: Waiting, missing_pages: int) -> list[Running] | None:
        """Return the fewest sequences to preempt so that `seq` can be admitted; None if it cannot."""
        missing_slots = len(self._holding) + 1 - self._slots
        victims: list[Running] = []
        while missing_slots > 0 or missing_pages > 0:
            below = self.in_order()[: len(self._holding) - len(victims)]
            if not below or below[-1].overdue or below[-1].priority >= seq.priority:
                return None
            victims.append(below[-1])
            missing_slots -= 1
            missing_pages -= self._claim(below[-1])
        return victims

    def _claim(self, seq: Running) -> int:
        """Count the pages it will hold once all its known tokens are computed, which are reserved for it."""
        return max(self._count(seq.tokens), self._held(seq))

    def _preempt(self, seq: Running) -> None:
        self._pages += self._held(seq)
        del self._holding[seq.id]
        self.work.pop(seq.id, None)
        self.preempted.append(seq.id)

    def _held(self, seq: Running) -> int:
        """Count the pages it holds, those of its work in this step included."""
        return max(self._count(seq.computed + self.work.get(seq.id, 0)), seq.pages)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)
