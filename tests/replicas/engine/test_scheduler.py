"""Plans of single steps, and what they come to when one follows the other (`_Queue`)."""

import random
from collections import defaultdict

from quire.replicas.engine.scheduler import (
    MAX_OVERTAKEN,
    Prompt,
    Running,
    SchedulerState,
    SeqId,
    StepPlan,
    Waiting,
    Work,
    plan_step,
    share_budget,
)

PAGE = 16


def _plan(running=(), waiting=(), pages=100, max_running=8, budget=64) -> StepPlan:
    return plan_step(SchedulerState(running, waiting, pages, PAGE, max_running, budget))


def _running(i, tokens, computed, priority=0, overdue=False):
    return Running(SeqId(i), priority, tokens, computed, -(-computed // PAGE), overdue)


def _waiting(i, tokens, cached=0, idle=0, priority=0, overdue=False):
    return Waiting(SeqId(i), priority, tokens, cached, idle, overdue)


class _Queue:
    """Executes one plan after the other: prompts of `tokens`, then `output` decoding steps each."""

    def __init__(self, *, budget, max_running=64, pages=1 << 20):
        self.budget, self.max_running, self.pages = budget, max_running, pages
        self.steps = 0
        self.first_token: dict[int, int] = {}
        """Steps until a sequence had its first token, by id."""
        self.finished: set[int] = set()
        self.computed: dict[int, int] = defaultdict(int)
        self.overtaken: dict[int, int] = defaultdict(int)
        self._known: dict[int, int] = {}
        self._end: dict[int, int] = {}
        self._priority: dict[int, int] = {}
        self._runs: set[int] = set()

    def add(self, tokens, *, priority=0, output=1):
        i = len(self._known)
        self._known[i], self._end[i], self._priority[i] = tokens, tokens + output, priority
        return i

    @property
    def open(self):
        return [i for i in self._known if i not in self.finished]

    def step(self):
        late = {i: self.overtaken[i] >= MAX_OVERTAKEN for i in self.open}
        runs = [_running(i, self._known[i], self.computed[i], self._priority[i], late[i]) for i in self._runs]
        waits = [
            _waiting(i, self._known[i], 0, 0, self._priority[i], late[i])
            for i in self.open
            if i not in self._runs
        ]
        free = self.pages - sum(r.pages for r in runs)
        plan = plan_step(SchedulerState(runs, waits, free, PAGE, self.max_running, self.budget))
        self.steps += 1
        for i in plan.preempt:
            self._runs.remove(i)
            self.computed[i] = 0
        for i in plan.admit:
            self._runs.add(i)
            for other in self.open:
                self.overtaken[other] += other < i and other not in self._runs
        for work in plan.work:
            i = work.id
            self.computed[i] += work.tokens
            if self.computed[i] == self._known[i]:
                self.first_token.setdefault(i, self.steps)
                self._known[i] += 1
                if self._known[i] == self._end[i]:
                    self._runs.remove(i)
                    self.finished.add(i)

    def run(self):
        while self.open:
            self.step()


def test_a_short_prompt_passes_a_long_one_that_is_under_way():
    queue = _Queue(budget=8192)
    queue.add(128 << 10)
    queue.step()
    short = queue.add(100)
    queue.run()
    assert queue.first_token[short] <= 1 + 2


def test_long_prompts_that_come_at_once_wait_for_no_more_than_twice_their_share():
    rng = random.Random(2)
    lengths = [rng.randint(16 << 10, 128 << 10) for _ in range(20)]
    queue = _Queue(budget=8192)
    for tokens in lengths:
        queue.add(tokens)
    queue.run()
    for i, tokens in enumerate(lengths):
        share_steps = sum(min(tokens, other) for other in lengths) / 8192  # if all advanced alike
        assert queue.first_token[i] <= 2 * share_steps + 1


def test_the_oldest_prompt_keeps_a_quarter_of_the_budget_whatever_comes():
    queue = _Queue(budget=400)
    long = queue.add(4000)
    while long not in queue.first_token:
        for _ in range(4):
            queue.add(100, priority=100)
        queue.step()
    assert queue.steps <= 40


def test_the_rest_goes_by_priority_and_then_to_the_prompt_with_the_least_left():
    prompts = [Prompt(0, 900, SeqId(1)), Prompt(0, 80, SeqId(2)), Prompt(-1, 700, SeqId(3))]
    assert share_budget(prompts, 400) == {1: 100, 2: 0, 3: 300}
    assert share_budget(prompts[:2], 400) == {1: 320, 2: 80}


def test_a_slot_is_taken_from_the_last_comer_of_lower_priority():
    running = [_running(1, 20, 19, priority=-5), _running(2, 20, 19, priority=-5), _running(3, 20, 19)]
    plan = _plan(running, [_waiting(4, 2)], max_running=3)
    assert (plan.preempt, plan.admit) == ((2,), (4,))
    assert Work(SeqId(4), 2) in plan.work


def test_pages_are_taken_from_lower_priorities_and_only_if_that_helps():
    running = [_running(1, 33, 32, priority=-5), _running(2, 17, 16, priority=-5), _running(3, 33, 32)]
    assert _plan(running, [_waiting(4, 30)], pages=3).preempt == (2,)
    assert _plan(running, [_waiting(4, 80)], pages=3).preempt == (2, 1)
    assert _plan(running, [_waiting(4, 81)], pages=3).preempt == ()


def test_equals_do_not_take_slots_from_each_other():
    plan = _plan([_running(1, 20, 19), _running(2, 20, 19)], [_waiting(3, 2)], max_running=2)
    assert (plan.preempt, plan.admit) == ((), ())


def test_an_overdue_sequence_goes_first_and_keeps_its_slot():
    waiting = [_waiting(1, 10, priority=-5, overdue=True), _waiting(2, 10, priority=5)]
    assert _plan([_running(3, 20, 19, priority=5)], waiting, max_running=2).admit == (1,)
    running = [_running(1, 20, 19, priority=-5, overdue=True)]
    assert _plan(running, waiting[1:], max_running=1).preempt == ()


def test_prompts_that_the_budget_does_not_reach_take_no_slot():
    plan = _plan([_running(1, 900, 100)], [_waiting(2, 900), _waiting(3, 10)], max_running=2)
    assert plan.admit == (3,)


def test_nothing_starves_in_any_order_of_arrival():
    rng = random.Random(3)
    for _ in range(20):
        queue = _Queue(budget=96, max_running=4, pages=40)
        while len(queue.finished) < 150:
            if len(queue.open) < 12:  # more than can run, of any size, and mostly above what is there
                tokens, priority = rng.choice([3, 30, 300]), rng.choice([-100, 0, 100, 100, 100])
                queue.add(tokens, priority=priority, output=rng.choice([1, 9]))
            queue.step()
            assert queue.steps < 20_000
        assert max(queue.overtaken.values()) <= MAX_OVERTAKEN + queue.max_running
        assert len(queue.open) <= 12


def test_decoding_goes_before_prompts_and_prompts_get_the_rest_of_the_budget():
    plan = _plan(running=[_running(1, 200, 0), _running(2, 40, 39)], budget=64)
    assert plan.work == (Work(SeqId(2), 1), Work(SeqId(1), 63))


def test_a_long_prompt_is_cut_to_the_budget():
    assert _plan(waiting=[_waiting(1, 500)], budget=64).work == (Work(SeqId(1), 64),)


def test_cached_blocks_are_not_computed_again():
    plan = _plan(waiting=[_waiting(1, 50, cached=3)], budget=64)
    assert plan.admit == (1,)
    assert plan.work == (Work(SeqId(1), 2),)


def test_admission_is_in_order_and_stops_at_the_first_that_does_not_fit():
    plan = _plan(waiting=[_waiting(1, 33), _waiting(2, 100), _waiting(3, 5)], pages=4)
    assert plan.admit == (1,)


def test_unused_cached_blocks_count_as_pages_once_they_are_taken():
    assert _plan(waiting=[_waiting(1, 33, cached=2, idle=2)], pages=2).admit == ()
    assert _plan(waiting=[_waiting(1, 33, cached=2, idle=0)], pages=1).admit == (1,)


def test_pages_promised_to_prompts_in_progress_are_not_given_away():
    running = [_running(1, 160, 64), _running(2, 30, 16)]  # need 6 and 1 more pages in all
    assert _plan(running, [_waiting(3, 16)], pages=7, budget=120).admit == ()
    assert _plan(running, [_waiting(3, 16)], pages=8, budget=120).admit == (3,)


def test_higher_priority_overtakes_the_queue():
    plan = _plan(waiting=[_waiting(1, 10), _waiting(2, 10, priority=5)], max_running=1)
    assert plan.admit == (2,)


def test_when_pages_run_out_the_last_comer_gives_way():
    running = [_running(1, 17, 16), _running(2, 17, 16), _running(3, 17, 16)]
    plan = _plan(running, pages=1)
    assert plan.preempt == (3,)
    assert [w.id for w in plan.work] == [1, 2]


def test_priority_decides_who_gives_way():
    plan = _plan([_running(1, 17, 16), _running(2, 17, 16, priority=1)], pages=0)
    assert plan.preempt == (1,)
    assert [w.id for w in plan.work] == [2]


def test_nobody_is_admitted_in_a_step_that_preempts():
    assert _plan([_running(1, 17, 16), _running(2, 17, 16)], [_waiting(3, 1)], pages=0).admit == ()


def test_a_preempted_sequences_planned_work_is_withdrawn():
    running = [_running(1, 60, 16), _running(2, 17, 16)]  # 2 decodes, so it is planned first
    plan = _plan(running, pages=3, budget=64)
    assert plan.preempt == (2,)
    assert plan.work == (Work(SeqId(1), 44),)


def test_every_plan_fits_the_pool_the_budget_and_the_slots():
    rng = random.Random(1)
    for _ in range(2000):
        running = []
        for i in range(rng.randint(0, 6)):
            tokens = rng.randint(1, 90)
            running.append(_running(i, tokens, rng.randint(0, tokens - 1), rng.randint(0, 2)))
        waiting = []
        for i in range(10, 10 + rng.randint(0, 6)):
            tokens = rng.randint(1, 90)
            cached = rng.randint(0, (tokens - 1) // PAGE)
            waiting.append(_waiting(i, tokens, cached, rng.randint(0, cached), rng.randint(0, 2)))
        pages = rng.randint(0, 12) + sum(w.idle_pages for w in waiting)
        plan = _plan(running, waiting, pages=pages, max_running=7, budget=64)
        work = {w.id: w.tokens for w in plan.work}
        assert sum(work.values()) <= 64
        assert all(n > 0 for n in work.values())
        assert set(plan.admit) <= set(work)
        assert not set(plan.preempt) & set(work)
        assert len(running) - len(plan.preempt) + len(plan.admit) <= 7
        left = pages + sum(r.pages for r in running if r.id in plan.preempt)
        for r in running:
            if r.id in work:
                left -= -(-(r.computed + work[r.id]) // PAGE) - r.pages
        for w in waiting:
            if w.id in plan.admit:
                left -= w.idle_pages + -(-(w.cached_pages * PAGE + work[w.id]) // PAGE) - w.cached_pages
        assert left >= 0
        assert work or plan.preempt or not running
