"""The bound on what a shard sends."""

import pytest

from quire.kvstore.peers.bandwidth import Bandwidth


def test_a_full_bucket_lets_its_burst_pass_and_then_holds_the_rate():
    limit = Bandwidth(100.0, burst_bytes=200)
    now, sent = 1000.0, 0
    waits = []
    for _ in range(10):
        waits.append(limit.reserve(100, now))
        now += waits[-1]
        sent += 100
    assert waits[:2] == [0, 0]
    assert waits[2:] == [pytest.approx(1.0)] * 8


def test_links_wait_in_the_order_in_which_they_ask():
    limit = Bandwidth(100.0, burst_bytes=100)
    assert [limit.reserve(100, 50.0) for _ in range(3)] == [0, pytest.approx(1), pytest.approx(2)]


def test_time_that_passes_unused_fills_the_bucket_once():
    limit = Bandwidth(100.0, burst_bytes=100)
    limit.reserve(100, 0.0)
    assert limit.reserve(100, 1000.0) == 0
    assert limit.reserve(100, 1000.0) == pytest.approx(1)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="positive"):
        Bandwidth(0, 1)
