"""Orders keep their time and number; reports reach whoever waits for them."""

from __future__ import annotations

import queue
import time

import pytest
from store_peers import keys_of
from torch.distributed import TCPStore

from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.messages import Moved, ReceivePages, TransferId
from quire.kvstore.wire.failures import Cause
from quire.kvstore.wire.groups import host_store, join_store
from quire.kvstore.wire.transport import Endpoint
from quire.replicas.runner.orders import NumberedOrder, Reports, leave_report

ORDER = ReceivePages(
    transfer=TransferId(3),
    keys=tuple(keys_of(2)),
    pages=(PageId(5), PageId(1)),
    generations=(7, 2**40),
    peers=(Endpoint("a", "127.0.0.1", 1),),
    timeout_s=2.0,
)
HOST = "127.0.0.1"


def moved(rank: int, transfer: int = 3) -> Moved:
    return Moved(TransferId(transfer), rank, True, 0.5, 100, Cause.DEADLINE, "as if")


@pytest.fixture
def store() -> TCPStore:
    return host_store(HOST, 10)


def test_an_order_that_waited_has_less_time_left_and_never_less_than_none():
    waited = NumberedOrder(260, ORDER, time.monotonic() - 0.5)
    arrived = NumberedOrder.from_bytes(memoryview(waited.to_bytes()))
    assert arrived.number == 260
    assert 1 < arrived.order.timeout_s <= 1.5
    assert (arrived.order.keys, arrived.order.pages) == (ORDER.keys, ORDER.pages)
    assert NumberedOrder(0, ORDER, time.monotonic() - 5).left().timeout_s == 0


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
