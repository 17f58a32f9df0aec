"""Reports of all ranks reach the caller that waits for them."""

from __future__ import annotations

import queue
import time

import pytest
from torch.distributed import TCPStore

from quire.kvstore.peers.ids import TransferId
from quire.kvstore.peers.messages import Moved
from quire.kvstore.wire.failures import Cause
from quire.kvstore.wire.groups import host_store, join_store
from quire.replicas.runner.orders import Reports, leave_report

HOST = "127.0.0.1"


def moved(rank: int, transfer: int = 3) -> Moved:
    return Moved(TransferId(transfer), rank, True, 0.5, 100, Cause.DEADLINE, "as if")


@pytest.fixture
def store() -> TCPStore:
    return host_store(HOST, 10)


def test_reports_of_all_ranks_reach_the_one_who_waits_for_them(store):
    reports = Reports(store, ranks=3)
    first: queue.Queue[Moved] = queue.Queue()
    second: queue.Queue[Moved] = queue.Queue()
    numbers = [reports.expect(first.put), reports.expect(second.put)]
    other = join_store(HOST, store.port, 10)
    for rank in (1, 2):
        leave_report(other, numbers[1], moved(rank, 4))
        leave_report(other, numbers[0], moved(rank))
    reports.deliver(numbers[0], moved(0))
    assert {first.get(timeout=5) for _ in range(3)} == {moved(rank) for rank in range(3)}
    assert {second.get(timeout=5) for _ in range(2)} == {moved(rank, 4) for rank in (1, 2)}
    reports.close()
    reports.deliver(numbers[1], moved(0, 4))  # a transfer that ended with rank 0's links
    assert second.get(timeout=5) == moved(0, 4)


def push_until_it_fails(store):
    """Not the first time: that goes into the socket's memory."""
    for _ in range(100):
        store.queue_push("any", b"")
        time.sleep(0.01)


def test_a_report_to_a_rank_0_that_is_gone_is_dropped(store):
    gone = host_store(HOST, 1)
    other = join_store(HOST, gone.port, 1)
    del gone
    with pytest.raises(RuntimeError):
        push_until_it_fails(other)
    leave_report(other, 0, moved(1))
