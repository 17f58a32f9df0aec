"""Streams move chunks between shards; a peer that dies, stops or never comes costs one stream and no more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from byte_streams import HOST, PATIENT, QUICK, SIGNALS, Collect, Numbers, stream_process
from forkserver import forkserver

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.tcp import TcpTransport
from quire.kvstore.wire.transport import Endpoint, LinkConfig, Ticket

SIZES = (70_000, 70_000, 70_000, 70_000, 30_001)
LARGE = (4 << 20,) * 12


@pytest.fixture
def ends() -> Iterator[tuple[TcpTransport, TcpTransport]]:
    one, other = TcpTransport(HOST, PATIENT), TcpTransport(HOST, PATIENT)
    yield one, other
    one.close()
    other.close()


@pytest.fixture
def quick() -> Iterator[tuple[TcpTransport, TcpTransport]]:
    one, other = TcpTransport(HOST, QUICK), TcpTransport(HOST, QUICK)
    yield one, other
    one.close()
    other.close()


def move(
    sender: TcpTransport, receiver: TcpTransport, ticket: int, sizes: tuple[int, ...] = SIZES
) -> tuple[Future[None], Future[None], Collect]:
    sink = Collect(sizes)
    received = receiver.receive(sender.endpoint, Ticket(ticket), sink, 30)
    sent = sender.send(receiver.endpoint, Ticket(ticket), Numbers(sizes, ticket), 30)
    return sent, received, sink


def cause(future: Future[None]) -> Cause:
    error = future.exception(30)
    assert isinstance(error, TransferFailed)
    return error.cause


@dataclass
class Process:
    """A transport in a process of its own."""

    process: BaseProcess
    control: Connection
    endpoint: Endpoint

    def order(self, *what: object) -> None:
        self.control.send(what)

    def reply(self) -> object:
        assert self.control.poll(60)
        return self.control.recv()


@contextmanager
def process() -> Iterator[Process]:
    context = forkserver()
    ours, theirs = context.Pipe()
    child = context.Process(target=stream_process, args=(theirs,), daemon=True)
    child.start()
    assert ours.poll(60)
    try:
        yield Process(child, ours, ours.recv())
    finally:
        child.kill()
        child.join()


def test_what_is_filled_is_what_is_taken_in_order(ends):
    sent, received, sink = move(*ends, 7)
    received.result(30)
    sent.result(30)
    assert sink.holds(7)


def test_streams_from_one_process_to_another_go_one_after_another(ends):
    under_way: list[int] = []

    class Alone(Numbers):
        def read_chunk(self, index: int, buffer: torch.Tensor) -> torch.Tensor:
            assert under_way in ([], [self.seed])
            under_way[:] = [self.seed] if index < len(SIZES) - 1 else []
            return super().read_chunk(index, buffer)

    sinks = [Collect(SIZES) for _ in range(4)]
    received = [ends[1].receive(ends[0].endpoint, Ticket(t), sink, 30) for t, sink in enumerate(sinks)]
    sent = [ends[0].send(ends[1].endpoint, Ticket(t), Alone(SIZES, t, pause_s=0.01), 30) for t in range(4)]
    for future in received + sent:
        future.result(30)
    assert all(sink.holds(ticket) for ticket, sink in enumerate(sinks))


def test_two_processes_that_send_to_each_other_do_not_wait_for_each_other(ends):
    ways = [ends, ends[::-1]]
    sinks = [Collect(SIZES) for _ in ways]
    both = threading.Barrier(2, timeout=30)

    class Together(Numbers):
        def read_chunk(self, index: int, buffer: torch.Tensor) -> torch.Tensor:
            both.wait()
            return super().read_chunk(index, buffer)

    received = [
        to.receive(of.endpoint, Ticket(1), sink, 30) for (of, to), sink in zip(ways, sinks, strict=True)
    ]
    for of, to in ways:
        of.send(to.endpoint, Ticket(1), Together(SIZES, 1), 30)
    for future in received:
        future.result(30)
    assert all(sink.holds(1) for sink in sinks)


def test_the_receiver_follows_the_order_in_which_the_sender_starts(ends):
    sinks = {t: Collect(SIZES) for t in (1, 2, 3)}
    received = [ends[1].receive(ends[0].endpoint, Ticket(t), sinks[t], 30) for t in (3, 1, 2)]
    sent = [ends[0].send(ends[1].endpoint, Ticket(t), Numbers(SIZES, t), 30) for t in (1, 2, 3)]
    for future in received + sent:
        future.result(30)
    assert all(sink.holds(ticket) for ticket, sink in sinks.items())


def test_it_listens_nowhere_but_at_its_host(ends):
    move(*ends, 1)[1].result(30)
    listening = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}
    assert listening == {HOST}


def test_nobody_listens_after_it_was_closed(ends):
    move(*ends, 1)[1].result(30)
    for end in ends:
        end.close()
    for end in ends:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, end.endpoint.port), 1).close()


def test_a_receiver_that_never_comes_ends_at_the_deadline_and_the_next_stream_works(ends):
    started = time.monotonic()
    future = ends[0].send(ends[1].endpoint, Ticket(1), Numbers(SIZES), 0.4)
    assert cause(future) in (Cause.DEADLINE, Cause.PEER)
    assert time.monotonic() - started < 5  # far below what one operation may take
    _, received, sink = move(*ends, 2)
    received.result(30)
    assert sink.holds(2)


def test_a_sink_that_refuses_a_chunk_ends_the_stream_and_the_next_one_works(ends):
    class Refuses(Collect):
        def write_chunk(self, index, chunk):
            raise TransferFailed(Cause.CHECKSUM, "not what was promised")

    received = ends[1].receive(ends[0].endpoint, Ticket(1), Refuses(LARGE), 5)
    sent = ends[0].send(ends[1].endpoint, Ticket(1), Numbers(LARGE), 5)
    assert cause(received) is Cause.CHECKSUM
    assert cause(sent) is Cause.PEER
    sent, received, sink = move(*ends, 2)
    received.result(30)
    assert sink.holds(2)


def test_a_receiver_that_comes_late_joins_what_the_sender_does_now(quick):
    """A long step kept it from its orders: the sender has given up its first streams by then."""
    sender, receiver = quick
    for ticket in range(6):
        sender.send(receiver.endpoint, Ticket(ticket), Numbers(SIZES, ticket), 30)
    time.sleep(1.5 * QUICK.operation_timeout_s)
    sinks = [Collect(SIZES) for _ in range(6)]
    received = [receiver.receive(sender.endpoint, Ticket(t), sink, 30) for t, sink in enumerate(sinks)]
    received[-1].result(30)
    assert sinks[-1].holds(5)


def test_chunks_of_other_sizes_than_were_agreed_are_not_received(ends):
    received = ends[1].receive(ends[0].endpoint, Ticket(1), Collect(SIZES), 5)
    ends[0].send(ends[1].endpoint, Ticket(1), Numbers((*SIZES[:-1], 30_002)), 5)
    assert cause(received) is Cause.HEADER
    _, received, sink = move(*ends, 2)
    received.result(30)
    assert sink.holds(2)


def test_connections_that_are_reset_between_two_streams_cost_none(ends):
    _, received, _ = move(*ends, 1)
    received.result(30)
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as end:  # it may go by itself
                end.shutdown(socket.SHUT_RDWR)
    _, received, sink = move(*ends, 2)
    received.result(30)
    assert sink.holds(2)


def test_nothing_is_taken_once_a_stream_has_ended(ends):
    sink = Collect(SIZES)
    received = ends[1].receive(ends[0].endpoint, Ticket(1), sink, 0.3)
    ends[0].send(ends[1].endpoint, Ticket(1), Numbers(SIZES, pause_s=0.2), 5)
    assert cause(received) in (Cause.DEADLINE, Cause.PEER)
    taken = len(sink.chunks)
    time.sleep(1)
    assert len(sink.chunks) == taken < len(SIZES)


def test_chunks_are_received_where_they_belong(ends):
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in LARGE[:-1]]
    sink = Collect(LARGE, buffers=buffers)
    received = ends[1].receive(ends[0].endpoint, Ticket(1), sink, 30)
    ends[0].send(ends[1].endpoint, Ticket(1), Numbers(LARGE, 1), 30)
    received.result(30)
    assert sink.holds(1)
    assert all(map(torch.equal, buffers, sink.chunks))


@pytest.mark.parametrize("ends_with", ["deadline", "refusal", "close"])
def test_nothing_is_written_in_place_once_a_stream_has_ended(ends_with):
    """The sender stops amid the chunks, and goes on later."""
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in LARGE[:-1]]
    sink = Collect(LARGE, buffers=buffers)
    receiver = TcpTransport(HOST, PATIENT)
    with process() as sender:
        timeout_s = 0.6 if ends_with == "deadline" else 20
        received = receiver.receive(sender.endpoint, Ticket(1), sink, timeout_s)
        sender.order("send", receiver.endpoint, Ticket(1), LARGE, (6, signal.SIGSTOP), 20)
        if ends_with == "close":
            time.sleep(0.3)
            receiver.close()
        if ends_with == "refusal":
            sink.write_chunk = refuse
        assert cause(received) is ENDS[ends_with]
        then = [buffer.clone() for buffer in buffers]
        os.kill(sender.process.pid, signal.SIGCONT)
        assert sender.reply() is not None
        time.sleep(0.2)
        assert all(map(torch.equal, buffers, then))
    receiver.close()


@pytest.mark.parametrize("ended_by", ["deadline", "close"])
def test_nothing_is_written_in_place_by_a_sender_that_is_slower_than_the_deadline(ends, ended_by):
    """It ends while the first chunk is awaited, and then the chunk comes."""
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in LARGE[:-1]]
    received = ends[1].receive(ends[0].endpoint, Ticket(1), Collect(LARGE, buffers=buffers), 0.3)
    sent = ends[0].send(ends[1].endpoint, Ticket(1), Numbers(LARGE, 1, pause_s=0.4), 5)
    if ended_by == "close":
        time.sleep(0.1)
        ends[1].close()
    assert cause(received) is ENDS[ended_by]
    assert cause(sent) is Cause.PEER
    assert not any(buffer.any() for buffer in buffers)


ENDS = {"deadline": Cause.DEADLINE, "refusal": Cause.CHECKSUM, "close": Cause.CLOSED}


def refuse(index: int, chunk: object) -> None:
    raise TransferFailed(Cause.CHECKSUM, "no")


def test_many_failures_leave_nothing_behind(ends):
    for ticket in range(60):
        sink, late = Collect(SIZES), ticket % 10 == 3
        if ticket % 2:
            sink.write_chunk = refuse
        received = ends[1].receive(ends[0].endpoint, Ticket(ticket), sink, 0.1 if late else 5)
        source = Numbers(SIZES, ticket, pause_s=0.2 if late else 0)
        sent = ends[0].send(ends[1].endpoint, Ticket(ticket), source, 5)
        received.exception(5)
        sent.exception(5)
        if ticket == 9:
            files = open_files()
    until = time.monotonic() + 30
    while open_files() > files + 12 and time.monotonic() < until:
        time.sleep(0.05)  # sockets close a little later, those of links that were given up above all
    assert open_files() <= files + 12


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "words",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100), bytes(1 << 20)],
    ids=["none", "few", "zeros", "many"],
)
def test_strangers_are_cut_off_and_cost_nobody_anything(quick, words):
    strangers = [socket.create_connection((HOST, quick[1].endpoint.port), 5) for _ in range(100)]
    for stranger in strangers:
        with suppress(ConnectionError):  # it was cut off amid its words
            stranger.sendall(words)
    _, received, sink = move(*quick, 1)
    received.result(30)
    assert sink.holds(1)
    for stranger in strangers:
        with suppress(ConnectionError):
            assert stranger.recv(1) == b""
        stranger.close()
    assert cause(quick[1].receive(quick[0].endpoint, Ticket(2), Collect(SIZES), 0.1)) is Cause.DEADLINE


def test_a_stream_that_was_meant_for_an_earlier_process_at_this_address_is_not_received(ends):
    """Tickets count from one in every process."""
    earlier = Endpoint("0" * 16, HOST, ends[1].endpoint.port)
    received = ends[1].receive(ends[0].endpoint, Ticket(1), Collect(SIZES), 0.5)
    assert cause(ends[0].send(earlier, Ticket(1), Numbers(SIZES), 5)) is Cause.PEER
    assert cause(received) is Cause.DEADLINE


def test_a_send_is_done_when_the_receiver_has_verified_all(ends):
    class Doubts(Collect):
        def verify(self):
            raise TransferFailed(Cause.CHECKSUM, "not what was promised")

    received = ends[1].receive(ends[0].endpoint, Ticket(1), Doubts(SIZES), 5)
    sent = ends[0].send(ends[1].endpoint, Ticket(1), Numbers(SIZES), 5)
    assert (cause(received), cause(sent)) == (Cause.CHECKSUM, Cause.PEER)


def test_more_streams_than_allowed_are_refused():
    hub = TcpTransport(HOST, LinkConfig(operation_timeout_s=0.5, max_streams=1))
    nobody = [Endpoint(name, HOST, 1) for name in "ab"]
    first = hub.receive(nobody[0], Ticket(1), Collect(SIZES), 0.5)
    assert cause(hub.receive(nobody[1], Ticket(2), Collect(SIZES), 0.5)) is Cause.BUSY
    assert cause(first) is Cause.DEADLINE
    assert cause(hub.receive(nobody[1], Ticket(3), Collect(SIZES), 0.5)) is Cause.DEADLINE
    hub.close()


@pytest.mark.parametrize("what", ["send", "receive"])
def test_without_threads_a_stream_is_refused_and_the_caller_goes_on(ends, what, monkeypatch):
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    body = Numbers(SIZES) if what == "send" else Collect(SIZES)
    assert cause(getattr(ends[0], what)(ends[1].endpoint, Ticket(1), body, 5)) is Cause.BUSY
    monkeypatch.undo()
    _, received, sink = move(*ends, 2)
    received.result(30)
    assert sink.holds(2)


def test_streams_leave_no_thread_behind(ends):
    for ticket in range(3):
        sent, received, _ = move(*ends, ticket)
        assert (sent.exception(30), received.exception(30)) == (None, None)
    until = time.monotonic() + 30
    while (left := [t.name for t in threading.enumerate() if t.name == "quire-stream"]) and (
        time.monotonic() < until
    ):
        time.sleep(0.01)
    assert not left


def test_a_process_that_closes_its_transports_ends_cleanly():
    code = (
        "from byte_streams import *\n"
        "a, b = (TcpTransport(HOST, QUICK) for _ in range(2))\n"
        "b.receive(a.endpoint, Ticket(1), Collect((9,)), 5)\n"
        "a.send(b.endpoint, Ticket(1), Numbers((9,)), 5).result(30)\n"
        "b.receive(a.endpoint, Ticket(2), Collect((9,)), 5)\n"
        "a.close(), b.close()"
    )
    support = str(Path(__file__).parents[2] / "support")
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {support!r})\n" + code],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_closing_fails_what_is_open_and_waits_for_nobody(ends):
    future = ends[1].receive(ends[0].endpoint, Ticket(1), Collect(SIZES), 30)
    started = time.monotonic()
    ends[1].close()
    assert cause(future) is Cause.CLOSED
    assert time.monotonic() - started < 10


def test_a_peer_that_is_not_there_is_noticed_at_once(ends):
    started = time.monotonic()
    future = ends[0].send(Endpoint("gone", HOST, 1), Ticket(1), Numbers(SIZES), 5)
    assert cause(future) is Cause.PEER
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_sender_that_dies_or_stops_costs_one_stream(ends, how, chunk):
    with process() as peer:
        sink, started = Collect(LARGE), time.monotonic()
        received = ends[0].receive(peer.endpoint, Ticket(1), sink, 2)
        peer.order("send", ends[0].endpoint, 1, LARGE, (chunk, SIGNALS[how]), 2)
        beside = move(ends[1], ends[0], 9)
        assert cause(received) in (Cause.PEER, Cause.DEADLINE)
        assert time.monotonic() - started < 8
        beside[1].result(30)
        assert beside[2].holds(9)


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_receiver_that_dies_or_stops_costs_one_stream(ends, how, chunk):
    with process() as peer:
        started = time.monotonic()
        peer.order("receive", ends[0].endpoint, 1, LARGE, (chunk, SIGNALS[how]), 2)
        sent = ends[0].send(peer.endpoint, Ticket(1), Numbers(LARGE, 1), 2)
        beside = move(ends[0], ends[1], 9)
        assert cause(sent) in (Cause.PEER, Cause.DEADLINE)
        assert time.monotonic() - started < 8
        beside[1].result(30)
        assert beside[2].holds(9)


def test_a_peer_that_was_stopped_and_goes_on_is_sent_to_again(ends):
    with process() as peer:
        assert peer.process.pid is not None
        os.kill(peer.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        sent = ends[0].send(peer.endpoint, Ticket(1), Numbers(SIZES, 1), 0.5)
        assert cause(sent) in (Cause.PEER, Cause.DEADLINE)  # it is silent
        assert time.monotonic() - started < 5
        os.kill(peer.process.pid, signal.SIGCONT)
        for ticket in (2, 3, 4):
            peer.order("receive", ends[0].endpoint, ticket, SIZES, None, 30)
            sent = ends[0].send(peer.endpoint, Ticket(ticket), Numbers(SIZES, ticket), 30)
            assert (sent.exception(30), peer.reply()) == (None, None)
