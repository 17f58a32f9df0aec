"""Streams between CPUs: a TCP connection and a thread at either end for each of them.

    sender     →  header   who sends to whom, which ticket, and a digest of the chunks' sizes
               →  chunks   nothing but their bytes
    receiver   ←  ack      one byte, when all were taken and verified

Streams from one process to another go one after another. A stream that fails on either side, or takes too
long, closes its connection. The receiver's memory is written only by `recv` calls that never wait, under the
stream's lock: nothing is written once the stream has ended.
"""

from __future__ import annotations

import logging
import math
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.listener import NAME_BYTES, Header, Listener, digest_of
from quire.kvstore.wire.stream import Body, Stream
from quire.kvstore.wire.threads import use_batch_scheduling
from quire.kvstore.wire.transport import Endpoint, LinkConfig, Sink, Source, Ticket

log = logging.getLogger(__name__)

_ACK = b"\6"
_LEAST_S = 0.001
_PIECE_BYTES = 256 << 10
"""A receiver is woken up for this many at a time: for every packet, it took a tenth more CPU time."""


class TcpTransport:
    """The `Transport` of a process whose pool is in a CPU's memory."""

    def __init__(self, host: str, config: LinkConfig | None = None) -> None:
        """`host`: the address at which peers reach this process, and the only one it listens at."""
        self._config = config or LinkConfig()
        self._patience_s = self._config.operation_timeout_s
        self._changed = threading.Condition()
        self._sending: list[Stream[Source]] = []
        self._receiving: list[Stream[Sink]] = []
        """Those that have not ended, the oldest first."""
        self._threads: set[threading.Thread] = set()
        self._closed = False
        name = secrets.token_hex(NAME_BYTES)
        self._listener = Listener(host, name, self._patience_s, self._connected)
        self.endpoint = Endpoint(name, host, self._listener.port)

    def send(self, peer: Endpoint, ticket: Ticket, source: Source, timeout_s: float) -> Future[None]:
        """Send the chunks of `source` to a peer that receives this ticket."""
        stream = Stream(peer, ticket, source, time.monotonic() + timeout_s)
        self._open(stream, self._sending)
        try:
            self._begin(self._send, stream)
        except RuntimeError as error:
            stream.end(TransferFailed(Cause.BUSY, str(error)))
        return stream.future

    def receive(self, peer: Endpoint, ticket: Ticket, sink: Sink, timeout_s: float) -> Future[None]:
        """Receive the chunks that a peer sends under this ticket."""
        stream = Stream(peer, ticket, sink, time.monotonic() + timeout_s, sink.synchronize)
        self._open(stream, self._receiving)
        return stream.future

    def close(self) -> None:
        """Fail all open streams. Waits for peers no longer than one operation may take."""
        self._listener.close()
        with self._changed:
            self._closed = True
            left: list[Stream[Any]] = [*self._sending, *self._receiving]
            self._changed.notify_all()
        for stream in left:
            stream.end(TransferFailed(Cause.CLOSED, "the transport was closed"))
        self._join()

    def _join(self) -> None:
        """A thread that is inside torch when the interpreter ends takes the process down with an abort."""
        until_s = time.monotonic() + self._patience_s
        for thread in list(self._threads):
            thread.join(max(until_s - time.monotonic(), 0.0))

    # ---- the life of a stream

    def _open(self, stream: Stream[Body], streams: list[Stream[Body]]) -> None:
        """Make it one of the open streams until it ends, at its deadline at the latest."""
        with self._changed:
            if self._closed:
                refusal = TransferFailed(Cause.CLOSED, "the transport was closed")
            elif len(streams) >= self._config.max_streams:
                refusal = TransferFailed(Cause.BUSY, f"{len(streams)} streams are open, as many as allowed")
            else:
                refusal = None
                streams.append(stream)
        if refusal is not None:
            stream.end(refusal)
            return
        timer = threading.Timer(stream.deadline_s - time.monotonic(), stream.end, (stream.overdue(),))

        def ended(_: Future[None]) -> None:
            timer.cancel()
            with self._changed:
                streams.remove(stream)
                self._changed.notify_all()

        stream.future.add_done_callback(ended)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:  # there is no thread to be had
            stream.end(TransferFailed(Cause.BUSY, str(error)))
        with self._changed:
            self._changed.notify_all()

    def _begin(self, run: Callable[..., None], *arguments: object) -> None:
        """Call it in a thread of its own. Raises RuntimeError if there is none to be had."""

        def call() -> None:
            try:
                with self._surroundings():
                    run(*arguments)
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=call, name="quire-stream", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            raise

    def _surroundings(self) -> Any:
        """What every thread runs in."""
        use_batch_scheduling()
        return nullcontext()

    def _move(self, stream: Stream[Body], move: Callable[[Stream[Body]], None]) -> None:
        try:
            move(stream)
            stream.end()
        except Exception as error:  # the thread's outermost frame: whatever it was, the stream has failed
            if not isinstance(error, (TransferFailed, RuntimeError, OSError)):  # torch's own, and sockets'
                log.exception("stream %s failed", stream.ticket)
            stream.end(error)
        finally:
            if stream.connection is not None:
                stream.connection.close()

    # ---- the sender's end

    def _send(self, stream: Stream[Source]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: stream.ended or self._is_next(stream))
        if not stream.ended:
            self._move(stream, self._send_now)

    def _is_next(self, stream: Stream[Source]) -> bool:
        return next(s for s in self._sending if s.peer.name == stream.peer.name) is stream

    def _send_now(self, stream: Stream[Source]) -> None:
        peer, until_s = stream.peer, stream.until_s(self._patience_s)
        left_s = max(until_s - time.monotonic(), _LEAST_S)
        connection = socket.create_connection((peer.host, peer.port), left_s)
        stream.begin(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        header = Header.of(self.endpoint, peer, stream.ticket, stream.body.sizes)
        send(connection, header.to_bytes(), until_s)
        self._send_chunks(stream, connection)
        if receive(connection, 1, stream.until_s(self._patience_s)) != _ACK:
            raise ConnectionError("the receiver ended the stream")

    def _send_chunks(self, stream: Stream[Source], connection: socket.socket) -> None:
        memory = _memory_for(stream.body)
        for index in range(len(stream.body.sizes)):
            stream.check()
            chunk = stream.body.read_chunk(index, _buffer(stream.body, index, memory))
            send(connection, _bytes_of(chunk), stream.until_s(self._patience_s))

    # ---- the receiver's end

    def _connected(self, header: Header, connection: socket.socket) -> None:
        """Called by the listener, whose thread must not wait."""
        try:
            if len(self._threads) >= 2 * self._config.max_streams:
                raise RuntimeError("more connections than streams may be open")
            self._begin(self._receive, header, connection)
        except RuntimeError:
            connection.close()

    def _receive(self, header: Header, connection: socket.socket) -> None:
        """A sender may be faster than the message that announces it, so that its stream is waited for."""
        sender = header.sender.decode()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._awaited(sender, header), self._patience_s)
            stream = self._awaited(sender, header)
            if stream is not None:
                stream.connection = connection
        if stream is None:
            connection.close()
        else:
            self._move(stream, lambda stream: self._receive_now(stream, connection, header.digest))

    def _awaited(self, sender: str, header: Header) -> Stream[Sink] | None:
        for stream in self._receiving:
            if (stream.peer.name, stream.ticket, stream.connection) == (sender, header.ticket, None):
                return stream
        return None

    def _receive_now(self, stream: Stream[Sink], connection: socket.socket, digest: bytes) -> None:
        stream.check()
        if digest != digest_of(stream.body.sizes):
            raise TransferFailed(Cause.HEADER, f"stream {stream.ticket} has other chunks than were agreed")
        self._receive_chunks(stream, connection)
        with suppress(OSError):  # all is here, whether or not the sender learns of it
            connection.send(_ACK)

    def _receive_chunks(self, stream: Stream[Sink], connection: socket.socket) -> None:
        """Write all chunks into the sink and verify them."""
        memory = _memory_for(stream.body)
        for index in range(len(stream.body.sizes)):
            buffer = _buffer(stream.body, index, memory)
            _fill(connection, _bytes_of(buffer), stream.until_s(self._patience_s), stream)
            with stream.lock:
                stream.check()
                stream.body.write_chunk(index, buffer)
        stream.body.verify()


def send(connection: socket.socket, data: bytes | memoryview, until_s: float) -> None:
    """Send all of it. Raises OSError if it is not done in time."""
    connection.settimeout(max(until_s - time.monotonic(), _LEAST_S))
    connection.sendall(data)


def receive(connection: socket.socket, count: int, until_s: float) -> bytes:
    """Receive `count` bytes. Raises OSError if they do not come in time."""
    data = bytearray(count)
    _fill(connection, memoryview(data), until_s)
    return bytes(data)


def _fill(
    connection: socket.socket, memory: memoryview, until_s: float, stream: Stream[Sink] | None = None
) -> None:
    """Fill `memory`. A thread that ends `stream` waits for one `recv` at most, which never blocks."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while memory:
        wanted = min(len(memory), _PIECE_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
        if not poll.poll(math.ceil(1000 * max(until_s - time.monotonic(), 0.0))):
            raise TimeoutError("the peer let a chunk wait for too long")
        with stream.lock if stream else nullcontext():
            if stream is not None:
                stream.check()
            count = connection.recv_into(memory)
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        memory = memory[count:]


def _memory_for(body: Source | Sink) -> Tensor:
    """Return memory for each of the chunks that have none of their own."""
    return torch.empty(max(body.sizes[len(body.buffers) :], default=0), dtype=torch.uint8)


def _buffer(body: Source | Sink, index: int, memory: Tensor) -> Tensor:
    return body.buffers[index] if index < len(body.buffers) else memory[: body.sizes[index]]


def _bytes_of(chunk: Tensor) -> memoryview:
    return chunk.numpy().data
