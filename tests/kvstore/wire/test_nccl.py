"""How streams between GPUs begin, end and share communicators. Here the chunks go by gloo between CPUs.

Real NCCL, and peers that are killed or stopped, are in `tests/gpu/test_links.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist
from byte_streams import HOST, Collect, Numbers
from torch import Tensor
from torch.distributed import Store

from quire.kvstore.wire import nccl
from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.groups import gloo_group
from quire.kvstore.wire.nccl import NcclTransport, Pair
from quire.kvstore.wire.transport import LinkConfig, Ticket

CPU = torch.device("cpu")
SIZES = (70_000, 70_000, 70_000, 70_000, 30_001)
SUCCESS, COMM_ERROR = 0, 2
"""Of torch's WorkResult, which torch.distributed does not export."""


class GlooPair:
    """What `Pair` is between GPUs."""

    made: list[GlooPair] = []  # noqa: RUF012

    def __init__(self, store: Store, *, rank: int, device: torch.device, timeout_s: float) -> None:
        self.rank, self.dropped = rank, False
        self._group = gloo_group(store, rank=rank, size=2, host=HOST, timeout_s=timeout_s)
        self.made.append(self)

    def post(self, chunk: Tensor, tag: int) -> dist.Work:
        assert not self.dropped
        move = self._group.send if self.rank == 0 else self._group.recv
        return move([chunk], 1 - self.rank, tag)

    def wait(self, work: dist.Work, timeout_s: float) -> None:
        work.wait()

    def drop(self) -> None:
        assert not self.dropped
        self.dropped, self._group = True, None


@pytest.fixture(autouse=True)
def pairs(monkeypatch) -> Iterator[list[GlooPair]]:
    monkeypatch.setattr(nccl, "Pair", GlooPair)
    monkeypatch.setattr(GlooPair, "made", [])
    yield GlooPair.made
    assert all(pair.dropped for pair in GlooPair.made)


@pytest.fixture
def opened() -> Iterator[list[NcclTransport]]:
    """Closed in the end."""
    transports: list[NcclTransport] = []
    yield transports
    for transport in transports:
        transport.close()


def open_one(opened: list[NcclTransport], **config: float) -> NcclTransport:
    opened.append(NcclTransport(HOST, CPU, LinkConfig(**{"operation_timeout_s": 5.0, **config})))
    return opened[-1]


def move(
    sender: NcclTransport, receiver: NcclTransport, ticket: int, sizes: tuple[int, ...] = SIZES
) -> tuple[Future[None], Future[None], Collect]:
    sink = Collect(sizes)
    received = receiver.receive(sender.endpoint, Ticket(ticket), sink, 30)
    return sender.send(receiver.endpoint, Ticket(ticket), Numbers(sizes, ticket), 30), received, sink


def moves(sender: NcclTransport, receiver: NcclTransport, ticket: int) -> bool:
    """Whether a stream arrives whole."""
    sent, received, sink = move(sender, receiver, ticket)
    return (sent.exception(40), received.exception(40)) == (None, None) and sink.holds(ticket)


def cause(future: Future[None]) -> Cause:
    error = future.exception(40)
    assert isinstance(error, TransferFailed)
    return error.cause


def test_streams_one_after_another_share_one_communicator_in_each_direction(opened, pairs):
    one, other = open_one(opened), open_one(opened)
    assert all(moves(*((one, other) if ticket % 2 else (other, one)), ticket) for ticket in range(6))
    assert len(pairs) == 4  # two ends each way


def test_streams_at_once_to_one_peer_share_it_too(opened, pairs):
    one, other = open_one(opened), open_one(opened)
    streams = [move(one, other, ticket) for ticket in range(4)]
    for ticket, (sent, received, sink) in enumerate(streams):
        assert (sent.exception(40), received.exception(40)) == (None, None)
        assert sink.holds(ticket)
    assert len(pairs) == 2


@pytest.mark.parametrize("side", ["sender", "receiver", "verifier"])
def test_a_stream_that_fails_costs_its_communicator_and_no_other_stream(opened, pairs, side):
    class Fails(Numbers, Collect):  # type: ignore[misc]
        def fail(self, *_: object) -> None:
            raise TransferFailed(Cause.CHECKSUM, "not what was promised")

        read_chunk = write_chunk = verify = fail

    one, other = open_one(opened), open_one(opened)
    assert moves(one, other, 1)
    source, sink = Numbers(SIZES, 2), Collect(SIZES)
    match side:
        case "sender":
            source.read_chunk = Fails.fail
        case "receiver":
            sink.write_chunk = Fails.fail
        case "verifier":
            sink.verify = lambda: Fails.fail(sink)
    received = other.receive(one.endpoint, Ticket(2), sink, 30)
    sent = one.send(other.endpoint, Ticket(2), source, 5)
    causes = cause(sent), cause(received)
    assert causes == ((Cause.CHECKSUM, Cause.PEER) if side == "sender" else (Cause.PEER, Cause.CHECKSUM))
    assert moves(one, other, 3)
    assert moves(one, other, 4)
    assert len(pairs) == 4


def test_a_receiver_that_lost_its_end_has_another_one_built(opened, pairs):
    one, other = open_one(opened), open_one(opened)
    assert moves(one, other, 1)
    for slot in other._in.clear():
        slot.drop()
    assert moves(one, other, 2)
    assert len(pairs) == 4


def test_chunks_of_other_sizes_than_were_agreed_reach_no_communicator(opened, pairs):
    one, other = open_one(opened), open_one(opened)
    received = other.receive(one.endpoint, Ticket(1), Collect(SIZES), 5)
    one.send(other.endpoint, Ticket(1), Numbers((*SIZES[:-1], 30_002)), 5)
    assert cause(received) is Cause.HEADER
    assert not pairs
    assert moves(one, other, 2)


def test_a_receiver_that_never_comes_ends_in_time_and_the_next_stream_works(opened, pairs):
    one, other = open_one(opened), open_one(opened)
    assert cause(one.send(other.endpoint, Ticket(1), Numbers(SIZES), 0.4)) in (Cause.DEADLINE, Cause.PEER)
    assert moves(one, other, 2)
    assert len(pairs) == 2


def test_the_least_recently_used_communicator_makes_room(opened, pairs):
    hub = open_one(opened, max_links=2)
    spokes = [open_one(opened) for _ in range(3)]
    assert all(moves(hub, spoke, ticket) for ticket, spoke in enumerate([*spokes, *spokes]))
    assert all(moves(spoke, hub, ticket) for ticket, spoke in enumerate([*spokes, *spokes]))
    assert sum(not pair.dropped for pair in pairs if pair.rank == 0) <= 2 + 3


def test_more_peers_at_once_than_allowed_are_refused(opened):
    hub, first, second = open_one(opened, max_links=1), open_one(opened), open_one(opened)
    slow, sink = Numbers(SIZES, 1, pause_s=0.5), Collect(SIZES)
    received = first.receive(hub.endpoint, Ticket(1), sink, 30)
    sent = hub.send(first.endpoint, Ticket(1), slow, 30)
    while not sink.chunks:
        time.sleep(0.01)
    refused, _, _ = move(hub, second, 2)
    assert cause(refused) is Cause.BUSY
    assert (sent.exception(40), received.exception(40)) == (None, None)
    assert moves(hub, second, 3)


def test_a_stream_whose_thread_hangs_ends_in_time_and_holds_up_nobody(opened, monkeypatch):
    """As torch does in the store of a peer that is stopped."""
    one, other = open_one(opened), open_one(opened)
    goes_on, joins = threading.Event(), nccl.join_store
    hung = iter([True])

    def hangs_once(host: str, port: int, patience_s: float) -> Store:
        if next(hung, False):
            assert goes_on.wait(60)
        return joins(host, port, patience_s)

    monkeypatch.setattr(nccl, "join_store", hangs_once)
    other.receive(one.endpoint, Ticket(1), Collect(SIZES), 1)
    assert cause(one.send(other.endpoint, Ticket(1), Numbers(SIZES), 0.5)) is Cause.DEADLINE
    assert moves(one, other, 2)  # while the first one still hangs
    goes_on.set()


# ---- what is asked of NCCL itself


class Completed:
    """What NCCL says of an operation that it has done, or given up; `result`: None, not written down yet."""

    def __init__(self, result):
        self._result = torch.futures.Future()
        if result is not None:
            self._result.set_result(result)

    def is_completed(self):
        return True

    def get_future_result(self):
        return self._result


def test_torch_tells_how_operations_ended():
    assert callable(dist.Work.get_future_result)


@pytest.fixture
def real():
    return Pair.__new__(Pair)  # there may be no GPU


def test_an_operation_that_nccl_gave_up_is_completed_too_and_is_an_error(real):
    with pytest.raises(RuntimeError, match="lost the other end"):
        real.wait(Completed(COMM_ERROR), 1)


@pytest.mark.parametrize("result", [SUCCESS, None])
def test_one_that_was_done_is_none(real, result):
    real.wait(Completed(result), 1)
