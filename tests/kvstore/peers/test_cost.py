"""Fetch or recompute, learned from measurements alone."""

from __future__ import annotations

import random

import pytest

from quire.kvstore.peers.cost import Average, Choice, CostConfig, CostModel, Decision, PrefillPace
from quire.kvstore.peers.ids import ReplicaId

A, B = ReplicaId("a"), ReplicaId("b")
TOKEN_BYTES = 10_000
UNKNOWN = Decision(Choice.FETCH, None, None)


def model(latency_s: float, bytes_per_s: float, prefill_s: float) -> CostModel:
    """One that has measured a link to A and its own prefill."""
    cost = CostModel()
    cost.prefilled(100, 100 * prefill_s, 0.0)
    for tokens in (64, 512, 2048):
        size = tokens * TOKEN_BYTES
        cost.fetched(A, size, latency_s + size / bytes_per_s, 0.0, UNKNOWN)
    return cost


def decide(cost: CostModel, tokens: int, owner: ReplicaId = A, queued: int = 0, now_s: float = 0) -> Decision:
    return cost.decide(owner, tokens * TOKEN_BYTES, tokens, queued, now_s)


def test_before_anything_is_known_it_recomputes_and_then_tries_each_link_once():
    cost = CostModel()
    assert decide(cost, 100).choice is Choice.RECOMPUTE
    cost.prefilled(100, 1.0, 0.0)
    first = decide(cost, 100)
    assert (first.choice, first.explores) == (Choice.FETCH, True)
    assert decide(cost, 100).choice is Choice.RECOMPUTE  # one trial at a time
    assert decide(cost, 100, B).choice is Choice.FETCH
    cost.fetched(A, 100 * TOKEN_BYTES, 0.1, 0.0, first)
    known = decide(cost, 100)
    assert (known.choice, known.explores, known.fetch_s) == (Choice.FETCH, False, pytest.approx(0.1))
    assert cost.stats.explorations == 2


def test_latency_and_rate_are_told_apart():
    cost = model(latency_s=0.05, bytes_per_s=1e8, prefill_s=1.0)
    assert decide(cost, 100).fetch_s == pytest.approx(0.05 + 0.01)
    assert decide(cost, 10_000).fetch_s == pytest.approx(0.05 + 1.0)


def test_short_prefixes_are_recomputed_and_long_ones_fetched():
    cost = model(latency_s=0.05, bytes_per_s=1e9, prefill_s=0.001)
    assert decide(cost, 20).choice is Choice.RECOMPUTE
    assert decide(cost, 1000).choice is Choice.FETCH
    slow = model(latency_s=0.05, bytes_per_s=1e6, prefill_s=0.001)
    assert decide(slow, 1000).choice is Choice.RECOMPUTE


def test_a_queue_of_prefill_speaks_for_fetching():
    cost = model(latency_s=0.05, bytes_per_s=1e9, prefill_s=0.001)
    assert decide(cost, 20, queued=500).choice is Choice.FETCH


def test_a_long_prompt_does_not_make_short_ones_look_slow():
    """Attention reads what stands before: 0.3 ms a token at a prompt's start, 1.6 ms after 16K tokens."""
    cost = model(latency_s=0.0, bytes_per_s=1e9, prefill_s=0.0003)
    for start in range(0, 16384, 512):
        before = start + 256
        cost.prefilled(512, 512 * (0.0003 + before * 8e-8), 0.0, before)
    decision = cost.decide(A, 1, 512, 0, 0.0)
    assert decision.recompute_s == pytest.approx(512 * (0.0003 + 256 * 8e-8), rel=0.05)
    behind = cost.decide(A, 1, 512, 0, 0.0, before=15872)
    assert behind.recompute_s == pytest.approx(512 * (0.0003 + 16128 * 8e-8), rel=0.05)


def test_steps_of_a_few_tokens_say_little_about_prefill():
    """What a fetch leaves to compute takes a step of its own, which costs more a token."""
    cost = model(latency_s=0.0, bytes_per_s=1e9, prefill_s=0.001)
    for _ in range(20):
        cost.prefilled(100, 0.1, 0.0)
        cost.prefilled(1, 0.02, 0.0)
    assert decide(cost, 1000).recompute_s == pytest.approx(1.0, rel=0.25)


def test_the_rate_of_prefill_is_that_of_full_steps_and_follows_the_machine():
    pace = PrefillPace()
    assert pace.tokens_s is None
    pace.add(1000, 0.5, 0.0)
    for _ in range(50):
        pace.add(1, 0.05, 0.0)
    assert 1850 < pace.tokens_s <= 2000
    for _ in range(250):
        pace.add(1000, 1.0, 0.0)
    assert pace.tokens_s == pytest.approx(1000, rel=0.05)


def test_a_choice_is_kept_until_the_other_is_clearly_better():
    cost = CostModel(CostConfig(memory=1, hysteresis=0.2))
    cost.prefilled(1000, 1.0, 0.0)
    changes, last = 0, None
    for turn in range(50):
        cost.fetched(A, 1000 * TOKEN_BYTES, 0.95 if turn % 2 else 1.05, 0.0, UNKNOWN)
        choice = decide(cost, 1000).choice
        changes += choice is not last
        last = choice
    assert changes == 1
    cost.fetched(A, 1000 * TOKEN_BYTES, 0.5, 0.0, UNKNOWN)
    assert decide(cost, 1000).choice is Choice.FETCH


def test_a_link_that_failed_rests():
    cost = model(latency_s=0.0, bytes_per_s=1e9, prefill_s=0.001)
    decision = decide(cost, 1000)
    cost.failed(A, 1.0, 100.0, decision)
    cost.prefilled(1000, 1.0, 101.0)
    assert decide(cost, 1000, now_s=105).choice is Choice.RECOMPUTE
    assert decide(cost, 1000, now_s=111).choice is Choice.FETCH
    assert cost.stats.regret_s == pytest.approx(1.0)


def test_a_link_that_was_too_slow_is_measured_again_after_a_while():
    cost = model(latency_s=0.05, bytes_per_s=1e6, prefill_s=0.001)
    assert decide(cost, 1000, now_s=60).choice is Choice.RECOMPUTE
    again = decide(cost, 1000, now_s=61)
    assert (again.choice, again.explores) == (Choice.FETCH, True)
    cost.fetched(A, 1000 * TOKEN_BYTES, 10.0, 71.0, again)
    assert decide(cost, 1000, now_s=100).choice is Choice.RECOMPUTE


def test_prefill_is_measured_again_after_a_while_in_which_everything_was_fetched():
    cost = CostModel()
    cost.prefilled(100, 10.0, 0.0)  # a first step, in which much was loaded
    cost.fetched(A, 100 * TOKEN_BYTES, 0.5, 0.0, UNKNOWN)
    cost.fetched(A, 200 * TOKEN_BYTES, 0.6, 0.0, UNKNOWN)
    assert decide(cost, 15, now_s=61).choice is Choice.FETCH  # it is predicted to cost 1.1 s: not yet
    again = decide(cost, 15, now_s=111)
    assert (again.choice, again.explores) == (Choice.RECOMPUTE, True)
    assert decide(cost, 15, now_s=112).choice is Choice.FETCH  # one is enough
    cost.prefilled(15, 0.015, 112.0)
    for _ in range(5):
        cost.prefilled(100, 0.1, 113.0)
    assert decide(cost, 15, now_s=120).recompute_s < 1.5


def test_what_a_fetch_leaves_to_compute_does_not_count_as_a_measurement_of_prefill():
    cost = model(latency_s=0.05, bytes_per_s=1e9, prefill_s=0.001)
    for second in range(1, 70):
        cost.prefilled(2, 0.01, float(second))
    again = decide(cost, 100, now_s=70)
    assert (again.choice, again.explores) == (Choice.RECOMPUTE, True)


def test_regret_is_what_the_other_choice_would_have_saved():
    cost = model(latency_s=0.0, bytes_per_s=1e8, prefill_s=0.001)
    decision = decide(cost, 1000)  # fetch in 0.1 s or recompute in 1 s
    cost.fetched(A, 1000 * TOKEN_BYTES, 0.8, 0.0, decision)
    assert cost.stats.regrets == 0
    cost.fetched(A, 1000 * TOKEN_BYTES, 1.5, 0.0, decision)
    assert (cost.stats.regrets, cost.stats.regret_s) == (1, pytest.approx(0.5))


@pytest.mark.parametrize("bytes_per_s", [1e7, 3e7, 1e8, 1e9])
@pytest.mark.parametrize("latency_s", [0.001, 0.05])
def test_the_learned_choice_is_close_to_the_better_one(bytes_per_s, latency_s):
    """Against a link and a prefill with 20 % of noise: summed over 512 to 16K tokens, within 10 %."""
    rng = random.Random(0)
    cost, prefill_s = CostModel(), 0.0003
    chosen = best = 0.0
    for turn in range(600):
        tokens = rng.choice([512, 1024, 2048, 4096, 8192, 16384])
        size = tokens * TOKEN_BYTES
        fetch_s = (latency_s + size / bytes_per_s) * rng.uniform(0.8, 1.2)
        recompute_s = tokens * prefill_s * rng.uniform(0.8, 1.2)
        decision = decide(cost, tokens)
        if decision.choice is Choice.FETCH:
            cost.fetched(A, size, fetch_s, 0.0, decision)
        else:
            cost.prefilled(tokens, recompute_s, 0.0)
            cost.recomputed(recompute_s, decision)
        if turn >= 50:
            chosen += fetch_s if decision.choice is Choice.FETCH else recompute_s
            best += min(latency_s + size / bytes_per_s, tokens * prefill_s)
    assert chosen <= 1.1 * best


def test_peers_remembered_are_bounded():
    cost = CostModel(CostConfig(max_links=10))
    for peer in range(100):
        cost.fetched(ReplicaId(str(peer)), 1000, 1.0, 0.0, UNKNOWN)
    assert len(cost._links) == 10


def test_the_average_is_exact_at_first_and_forgets_later():
    average = Average(4)
    assert not average.known
    for value in (1, 2, 3, 4):
        average.add(value)
    assert average.value == 2.5
    for _ in range(40):
        average.add(10)
    assert average.value == pytest.approx(10, rel=1e-3)
