import random

from quire.replicas.scheduler import Running, SchedulerState, SeqId, StepPlan, Waiting, Work, plan_step

PAGE = 16


def _plan(running=(), waiting=(), pages=100, max_running=8, budget=64) -> StepPlan:
    return plan_step(SchedulerState(running, waiting, pages, PAGE, max_running, budget))


def _running(i, tokens, computed, priority=0):
    return Running(SeqId(i), priority, tokens, computed, -(-computed // PAGE))


def _waiting(i, tokens, cached=0, idle=0, priority=0):
    return Waiting(SeqId(i), priority, tokens, cached, idle)


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
