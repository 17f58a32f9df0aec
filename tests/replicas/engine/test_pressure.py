"""What autoscaling looks at, as a replica measures it."""

from dataclasses import replace

import pytest

from quire.replicas.engine.pressure import Load, Pressure, PressureGauge

IDLE = Load(pages=0, sequences=0, prompt_tokens=0, prefill_tokens_s=None, oldest_s=None)


def gauge() -> PressureGauge:
    return PressureGauge(pages=100, max_running=10)


def test_a_replica_that_has_done_nothing_is_not_pressed():
    assert gauge().read(IDLE, 5.0) == Pressure()


@pytest.mark.parametrize(
    ("pages", "sequences", "share"), [(50, 1, 0.5), (10, 8, 0.8), (130, 4, 1.3), (20, 25, 2.5)]
)
def test_occupancy_is_of_whatever_is_scarcer_and_exceeds_one_where_some_wait(pages, sequences, share):
    assert gauge().read(Load(pages, sequences, 0, None, None), 0.0).occupancy == pytest.approx(share)


def test_queued_tokens_become_seconds_at_the_measured_rate():
    assert gauge().read(Load(0, 1, 3000, 2000.0, None), 1.0).prefill_queue_s == 1.5


def test_use_is_what_was_computed_of_what_could_have_been_and_fades():
    ours = gauge()
    for second in range(1, 6):
        ours.prefilled(1000, now_s=float(second))
    idle = replace(IDLE, prefill_tokens_s=2000.0)
    assert ours.read(idle, 5.5).prefill_use == pytest.approx(0.5)
    assert ours.read(idle, 20.0).prefill_use == 0


def test_first_tokens_are_judged_by_the_tenth_of_them_that_is_late():
    ours = gauge()
    for n in range(1, 11):
        ours.first_token(n / 10, now_s=0.0)
    assert ours.read(IDLE, 1.0).first_token_s == 0.9
    assert ours.read(IDLE, 60.0).first_token_s == 0


def test_the_oldest_request_without_a_first_token_counts_with_its_age():
    ours = gauge()
    ours.first_token(0.1, now_s=9.0)
    assert ours.read(replace(IDLE, sequences=1, oldest_s=6.0), 10.0).first_token_s == 4.0
