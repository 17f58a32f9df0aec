"""The decision alone: what asks for more replicas, what allows fewer, and that it does not waver."""

import random
import re

import pytest

from quire.cluster.autoscaling import AutoscalingConfig, Observed, decide
from quire.cluster.config import parse
from quire.replicas.engine.pressure import Pressure
from quire.replicas.errors import ConfigError

CONFIG = AutoscalingConfig(max=8, occupancy=0.7, prefill_queue_s=1.0, prefill_use=0.8, first_token_s=2.0)
HALF = Pressure(occupancy=0.35, prefill_queue_s=0.1, prefill_use=0.3, first_token_s=0.5)


def fleet(*pressures: Pressure, running: int | None = None, target: int | None = None) -> Observed:
    running = len(pressures) if running is None else running
    return Observed(running, running if target is None else target, 0.0, pressures)


def with_(**loads: float) -> Pressure:
    return Pressure(**loads)


@pytest.mark.parametrize(
    ("seen", "replicas", "reason"),
    [
        pytest.param(fleet(HALF), 1, "KV occupancy", id="half full: stays"),
        pytest.param(fleet(with_(occupancy=0.9)), 2, "KV occupancy: 0.90 in all, 0.7 a replica", id="full"),
        pytest.param(fleet(*[with_(occupancy=0.9)] * 4), 6, "KV occupancy: 3.60 in all", id="all full"),
        pytest.param(fleet(with_(prefill_queue_s=1.5)), 2, "queued prefill", id="prompts wait"),
        pytest.param(
            fleet(*[with_(prefill_use=0.95)] * 2), 3, "use of the prefill rate", id="prefill in use"
        ),
        pytest.param(
            fleet(with_(occupancy=0.5, first_token_s=3.0)), 2, "first tokens take 3.00 s, 2 wanted", id="late"
        ),
        pytest.param(fleet(with_(occupancy=0.2, first_token_s=9.0)), 1, "KV", id="late, but hardly busy"),
        pytest.param(fleet(with_(occupancy=9.0)), 2, "KV", id="a queue at most doubles them"),
        pytest.param(fleet(*[with_(occupancy=9.0)] * 6), 8, "12 is outside 1..8", id="bound"),
        pytest.param(fleet(*[with_(occupancy=0.3)] * 3), 2, "KV occupancy: 0.90 in all", id="fits on fewer"),
        pytest.param(fleet(*[with_(occupancy=0.4)] * 2), 2, "KV", id="would fit, without a margin"),
        pytest.param(
            fleet(*[with_(occupancy=0.25, prefill_use=0.5)] * 2), 2, "use of the prefill", id="one says no"
        ),
        pytest.param(
            fleet(*[with_(occupancy=0.4, first_token_s=1.9)] * 3), 3, "KV", id="first tokens hardly in time"
        ),
        pytest.param(fleet(Pressure(), Pressure(), Pressure()), 1, "0 is outside 1..8", id="idle"),
        pytest.param(fleet(running=0, target=2), 2, "no replica runs", id="they are starting"),
        pytest.param(fleet(running=2), 2, "no replica has reported", id="nothing is known"),
        pytest.param(fleet(HALF, running=3), 3, "2 replicas have not reported", id="little is known"),
        pytest.param(fleet(with_(occupancy=0.9), target=2), 2, "KV", id="one is on its way already"),
        pytest.param(
            fleet(with_(occupancy=0.9, first_token_s=9), target=2), 2, "first", id="and late until it is here"
        ),
    ],
)
def test_decisions_and_their_reasons(seen, replicas, reason):
    decision = decide(seen, CONFIG)
    assert decision.replicas == replicas
    assert any(re.search(reason, said) for said in decision.reasons), decision.reasons


def test_the_load_that_asks_for_most_is_named_first():
    said = decide(fleet(with_(occupancy=0.8, prefill_queue_s=5.0, prefill_use=0.7)), CONFIG).reasons
    assert [reason.split(":")[0] for reason in said] == [
        "queued prefill in seconds",
        "KV occupancy",
        "use of the prefill rate",
    ]


def test_down_to_zero_and_up_again():
    config = AutoscalingConfig(min=0, max=3)
    assert decide(fleet(Pressure()), config).replicas == 0
    asleep = Observed(running=0, target=0, waiting=0.0, pressures=())
    assert decide(asleep, config).replicas == 0
    assert decide(Observed(0, 0, 1.0, ()), config).replicas == 1


def test_more_load_never_asks_for_fewer_replicas():
    rng = random.Random(5)
    fields = {"occupancy": 2.0, "prefill_queue_s": 4.0, "prefill_use": 1.2, "first_token_s": 5.0}
    reached = set()
    for _ in range(4000):
        running = rng.randint(1, 6)
        light = [{name: rng.random() * most for name, most in fields.items()} for _ in range(running)]
        heavy = [{name: value * (1 + rng.random()) for name, value in one.items()} for one in light]
        target = rng.randint(1, 8)
        wanted = [
            decide(fleet(*(Pressure(**one) for one in loads), target=target), CONFIG).replicas
            for loads in (light, heavy)
        ]
        assert wanted[0] <= wanted[1], (light, heavy, target)
        reached.add((wanted[0] > target) - (wanted[0] < target))
    assert reached == {-1, 0, 1}  # the cases go all three ways


@pytest.mark.parametrize("load", [0.4, 0.9, 1.3, 2.0, 2.6])
def test_a_noisy_constant_load_is_followed_once_and_then_left_alone(load):
    """± 12 % around any load: the number of replicas settles, whatever it began with."""
    rng = random.Random(7)
    for start in (1, 4, 8):
        target, changes, direction = start, 0, 0
        for _ in range(500):
            noisy = load * (0.88 + 0.24 * rng.random()) / target
            wanted = decide(fleet(*[with_(occupancy=noisy)] * target), CONFIG).replicas
            if wanted != target:
                step = 1 if wanted > target else -1
                changes += step != direction
                direction, target = step, wanted
        assert changes <= 1, (load, start)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"max": 0}, r"replicas\.autoscaling\.max must be .*at least 1"),
        ({"max": 2, "min": 3}, "min=3, max=2"),
        ({"max": 2, "occupancy": 0.0}, r"replicas\.autoscaling\.occupancy must be .*above 0"),
        ({"max": 2, "first_token_s": -1.0}, "first_token_s must be .*above 0"),
        ({"max": 2, "margin": 1.0}, r"margin must be a number \(at least 0 and below 1\)"),
        ({"max": 2, "look_back_s": 1.0}, r"look_back_s \(1.0\) must exceed report_period_s"),
        ({"max": 2, "downscale_delay_s": -1.0}, "downscale_delay_s must be .*at least 0"),
    ],
)
def test_knobs_that_make_no_sense_are_refused_by_name(knobs, text):
    with pytest.raises(ConfigError, match=text):
        parse({"engine": {"model": "demo"}, "replicas": {"autoscaling": knobs}})
