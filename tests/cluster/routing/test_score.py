"""Which replica is predicted to be soonest, from values alone."""

from dataclasses import replace

import pytest

from quire.cluster.routing.score import (
    STALE_S,
    Candidate,
    PromptSize,
    Reason,
    Weights,
    predict,
    rank,
    rates_of,
)
from quire.replicas.engine.load_report import LoadReport

PROMPT = PromptSize(tokens=1000, page_tokens=64)
IDLE = LoadReport(
    max_running=16,
    pages_total=100,
    pages_free=100,
    prefill_s_per_token=1e-3,
    step_s=0.02,
    hold_s=2.0,
)
BUSY = replace(IDLE, running=4, queued_tokens=800, pages_free=60)
DRAW = (0.1, 0.2, 0.3, 0.4)


def replica(name, load=IDLE, **fields):
    return Candidate(replica_id=name, load=load, **fields)


def predicted(candidate, delay=1.0):
    return predict(PROMPT, candidate, rates_of([candidate.load]), Weights(delay=delay))


def ranked(*candidates, prompt=PROMPT, draw=DRAW):
    return rank(prompt, candidates, draw, Weights(delay=1.0))


def test_the_only_one_is_taken_and_nothing_is_predicted():
    ranking = ranked(replica("a", load=None))
    assert (ranking.order, ranking.reason, ranking.best) == (("a",), Reason.ONLY, None)


def test_the_one_that_holds_the_prefix_is_soonest():
    ranking = ranked(replica("a"), replica("b", known_blocks=12))
    assert ranking.order == ("b", "a")
    assert ranking.reason is Reason.PREFIX
    assert ranking.best.cached_tokens == 12 * 64
    assert ranking.best.work_s == pytest.approx((1000 - 768) * 1e-3)


def test_a_hot_holder_of_the_prefix_loses_to_an_idle_replica():
    ranking = ranked(replica("hot", replace(BUSY, queued_tokens=1500), known_blocks=12), replica("idle"))
    assert ranking.order == ("idle", "hot")
    assert ranking.reason is Reason.LOAD


def test_a_prefix_that_is_there_is_waited_for_where_that_is_faster():
    """1 s of prefill elsewhere, against 0.232 s and 0.4 s of waiting."""
    holder = replica("holder", replace(IDLE, queued_tokens=400), known_blocks=12)  # 12 x 64 tokens
    stays = ranked(holder, replica("idle"))
    assert (stays.order, stays.reason) == (("holder", "idle"), Reason.PREFIX)


def undelayed(*candidates):
    """Nothing is charged for others' waiting."""
    return rank(PROMPT, candidates, DRAW, Weights(delay=0.0))


def test_a_prefix_that_comes_again_while_it_is_computed_is_computed_at_an_idle_replica_as_well():
    """0.5 s of waiting would be saved; computing 768 tokens there instead takes this request 0.268 s more."""
    computed = replica("holder", replace(IDLE, queued_tokens=500), known_blocks=12)
    coming = replace(computed, coming=True)
    assert undelayed(computed, replica("idle")).order[0] == "holder"
    copies = undelayed(coming, replica("idle"))
    assert (copies.order, copies.reason) == (("idle", "holder"), Reason.COPY)


@pytest.mark.parametrize(
    "other",
    [
        replica("runs something", replace(IDLE, running=1)),
        replica("has something to run", replace(IDLE, waiting=1)),
        replica("was sent something", sent_requests=1),
        replica("has said nothing", load=None),
    ],
)
def test_it_is_not_where_there_is_something_else_to_do(other):
    coming = replica("holder", replace(IDLE, queued_tokens=500), known_blocks=12, coming=True)
    assert undelayed(coming, other).order[0] == "holder"


def test_nor_where_somebody_has_it():
    coming = replica("coming", replace(IDLE, queued_tokens=500), known_blocks=12, coming=True)
    has_it = replica("has it", replace(IDLE, queued_tokens=600), known_blocks=12)
    assert undelayed(coming, has_it, replica("idle")).order[0] == "coming"


def test_one_that_is_nearly_computed_is_waited_for():
    """0.3 s of waiting would be saved, for 0.468 s more of this request."""
    nearly = replica("holder", replace(IDLE, queued_tokens=300), known_blocks=12, coming=True)
    assert undelayed(nearly, replica("idle")).order[0] == "holder"


def test_it_is_computed_where_it_saves_most():
    holder = replica("holder", replace(IDLE, queued_tokens=600), known_blocks=12, coming=True)
    some = replica("some", known_blocks=2)
    assert undelayed(holder, replica("idle"), some).order == ("some", "holder", "idle")


def test_what_was_just_sent_counts_though_no_report_has_it_yet():
    behind = replica("a", known_blocks=12, sent_tokens=1500, sent_requests=3)
    assert ranked(behind, replica("b")).order == ("b", "a")


def test_a_queue_is_worked_on_while_nobody_reports():
    told = replica("a", BUSY)
    older = replace(told, age_s=0.5)
    waits = [predicted(c).wait_s for c in (told, older)]
    assert waits[0] - waits[1] == pytest.approx(0.5)


def test_what_was_sent_is_worked_on_too_once_the_queue_is_done():
    """800 tokens queued 1 s ago took 0.8 s; 0.2 s have been left for the 500 that were sent since."""
    told = replica("a", BUSY, age_s=1.0, sent_tokens=500, sent_requests=1)
    step_s = BUSY.step_s / 2
    waits = [predicted(replace(told, sent_age_s=age_s)).wait_s - step_s for age_s in (0.0, 0.1, 0.5)]
    assert waits == pytest.approx([0.5, 0.4, 0.3])


def test_the_later_tokens_of_long_prompts_cost_more():
    load = replace(IDLE, prefill_s_per_token_before=1e-6)
    cold = predicted(replica("a", load))
    assert cold.work_s == pytest.approx(1000 * (1e-3 + 1e-6 * 500))


def test_fetching_counts_where_it_is_sooner():
    fetches = replace(IDLE, fetch_s=0.01, fetch_s_per_token=1e-5)
    near = predicted(replica("a", fetches, holder_blocks=10))
    assert near.fetched_tokens == 640
    assert near.work_s == pytest.approx(0.01 + 0.0064 + 0.36)
    slow = replace(fetches, fetch_s_per_token=1e-2)
    far = predicted(replica("a", slow, holder_blocks=10))
    assert (far.fetched_tokens, far.work_s) == (0, pytest.approx(1.0))


def test_a_full_pool_or_scheduler_makes_it_wait():
    no_pages = replace(IDLE, running=4, pages_free=0, pages_cached=0)
    no_place = replace(IDLE, running=16, waiting=8, pages_free=100)
    for load in (no_pages, no_place):
        assert predicted(replica("a", load)).pressure_s > 0.1
        assert ranked(replica("a", load), replica("b", replace(IDLE, running=4))).order[0] == "b"


def test_what_is_computed_makes_running_sequences_wait_and_what_is_fetched_does_not():
    busy = replace(IDLE, running=3, fetch_s=0.01, fetch_s_per_token=1e-5)
    assert predicted(replica("a", busy)).others_s == pytest.approx(3 * 1.0)
    assert predicted(replica("a", busy, known_blocks=10)).others_s == pytest.approx(3 * 0.36)
    assert predicted(replica("a", busy, holder_blocks=10)).others_s == pytest.approx(3 * 0.36)
    assert predicted(replica("a", busy), delay=0.5).others_s == pytest.approx(3 * 0.5)


def test_ties_go_to_the_one_chosen_less_then_to_the_draw():
    assert ranked(replica("a", chosen=3), replica("b", chosen=1)).order == ("b", "a")
    assert ranked(replica("a"), replica("b"), draw=(0.9, 0.1)).order == ("b", "a")


def test_ties_never_give_up_a_prefix():
    barely = PromptSize(tokens=70, page_tokens=64)
    ranking = ranked(replica("a", chosen=0), replica("b", known_blocks=1, chosen=9), prompt=barely)
    assert ranking.order[0] == "b"


def test_a_new_replica_is_thought_to_be_like_the_others_and_idle():
    ranking = ranked(replica("a", BUSY), replica("new", load=None))
    assert ranking.order[0] == "new"
    assert ranking.best.work_s == pytest.approx(1.0)


def test_one_bad_measurement_starves_nobody():
    """As of the first step in a new process: believed, it would never be corrected."""
    slow = replace(IDLE, prefill_s_per_token=20e-3)
    ranking = ranked(replica("slow", slow), replica("b", chosen=1), replica("c", chosen=1))
    assert ranking.order[0] == "slow"
    assert ranking.best.work_s == pytest.approx(1.0)


def test_one_that_fell_silent_comes_last():
    silent = replica("a", age_s=STALE_S + 1, known_blocks=15)
    assert ranked(silent, replica("b", BUSY)).order == ("b", "a")


def test_blind_it_takes_the_less_busy_of_two_drawn():
    unmeasured = replace(IDLE, prefill_s_per_token=0.0)
    ranking = ranked(
        replica("a", unmeasured, open_requests=5),
        replica("b", None, open_requests=2),
        replica("c", unmeasured, open_requests=0),
        draw=(0.1, 0.2, 0.3),
    )
    assert (ranking.order, ranking.reason) == (("b", "a", "c"), Reason.BLIND)
    stale = [replica(name, age_s=STALE_S + 1) for name in "ab"]
    assert ranked(*stale).reason is Reason.BLIND
