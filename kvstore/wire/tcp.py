"""Links between CPUs: one TCP connection from each sender to each receiver, which is kept.

    sender     →  header   who sends to whom, which ticket, and a digest of the chunks' sizes
               →  chunks   nothing but their bytes
    receiver   ←  ack      one byte, when all were taken and verified

A stream that fails on either side, or takes too long, closes its connection; the next one opens another.
Connections that do not begin by naming this process are closed. The receiver's memory is written only by
`recv` calls that never wait, under the stream's lock: nothing is written once the stream has ended.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import select
import selectors
import socket
import struct
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.links import Link, LinkConfig, LinkTransport, Site
from quire.kvstore.wire.streams import Body, Stream
from quire.kvstore.wire.transport import Endpoint, Sink, Source, Ticket

_HEADER = struct.Struct("<8s16s16sQ16s")
"""Protocol, receiver, sender, ticket, digest of the sizes."""
_PROTOCOL = b"quire-1\n"
_NAME_BYTES = 8
"""Of a process; written as hexadecimal digits."""
_ACK = b"\6"
_MAX_PENDING = 64
"""Connections that have not sent a header yet; the oldest makes room."""
_PAUSE_S = 0.001
_PIECE_BYTES = 256 << 10
"""A receiver is woken up for this many at a time: for every packet, it took a tenth more CPU time."""


class TcpTransport(LinkTransport):
    """The `Transport` of a process whose pool is in a CPU's memory."""

    def __init__(self, host: str, config: LinkConfig | None = None) -> None:
        """`host`: the address at which peers reach this process, and the only one it listens at."""
        config = config or LinkConfig()
        listener = socket.create_server((host, 0), backlog=_MAX_PENDING)
        endpoint = Endpoint(secrets.token_hex(_NAME_BYTES), host, listener.getsockname()[1])
        super().__init__(Site(endpoint, torch.device("cpu"), config), _OutLink, _InLink)
        self._listener = _Listener(listener, endpoint, config.operation_timeout_s, self._connected)

    def close(self) -> None:
        self._listener.close()
        super().close()

    def _connected(self, sender: Endpoint, connection: socket.socket) -> None:
        """A sender may be faster than the message that announces it, so this may open its link."""
        link = self._in.link(sender)
        assert isinstance(link, _InLink)
        link.connected(connection)


class _Listener:
    """Accepts connections and hands on those that begin with a valid header. All others are closed."""

    def __init__(
        self,
        listener: socket.socket,
        here: Endpoint,
        patience_s: float,
        connected: Callable[[Endpoint, socket.socket], None],
    ) -> None:
        self._socket, self._here, self._patience_s = listener, here, patience_s
        self._connected = connected
        self._pending: dict[socket.socket, float] = {}
        """Connections without a header yet, and until when they may send one; the oldest first."""
        self._selector = selectors.DefaultSelector()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="quire-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):  # it was closed before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        with self._selector, self._socket:
            self._selector.register(self._socket, selectors.EVENT_READ)
            while not self._closed:
                ready = self._selector.select(self._patience_s if self._pending else None)
                connections = [key.fileobj for key, _ in ready if key.fileobj is not self._socket]
                for connection in connections:
                    assert isinstance(connection, socket.socket)
                    self._hand_on(self._forget(connection))
                if len(connections) < len(ready):  # last, because it may close one of those
                    self._accept()
                now_s = time.monotonic()
                for connection in [c for c, until_s in self._pending.items() if until_s < now_s]:
                    self._forget(connection).close()
            for connection in list(self._pending):
                self._forget(connection).close()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:  # it is gone again, we are closed, or there are no descriptors: then later
            time.sleep(_PAUSE_S)
            return
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _HEADER.size)  # readable when whole
        if len(self._pending) == _MAX_PENDING:
            self._forget(next(iter(self._pending))).close()
        self._selector.register(connection, selectors.EVENT_READ)
        self._pending[connection] = time.monotonic() + self._patience_s

    def _forget(self, connection: socket.socket) -> socket.socket:
        self._selector.unregister(connection)
        del self._pending[connection]
        return connection

    def _hand_on(self, connection: socket.socket) -> None:
        """Its link will read the header again, like all that follow."""
        try:
            sender = _sender_of(connection.recv(_HEADER.size, socket.MSG_PEEK), self._here)
            self._connected(Endpoint(sender, connection.getpeername()[0], 0), connection)
        except (OSError, RuntimeError, TransferFailed):  # a stranger, one link too many, or no thread for it
            connection.close()


class _TcpLink(Link[Body]):
    """One end of a link. Its thread opens and closes the connection; others only shut it down."""

    def __init__(self, here: Site, peer: Endpoint) -> None:
        self._connection: socket.socket | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        super().__init__(here, peer)

    def stop(self) -> None:
        super().stop()
        self._shut_down()

    def _shut_down(self) -> None:
        """Whatever the thread waits for in the connection ends at once."""
        with self._changed, suppress(OSError):  # the peer may have closed it
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)

    def _drop(self) -> None:
        with self._changed:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _until_s(self, stream: Stream[Body]) -> float:
        """When the next operation of a stream has to be over."""
        self._check(stream)
        return min(time.monotonic() + self._patience_s, stream.deadline_s)

    def _buffer(self, body: Body, index: int) -> Tensor:
        """Where the chunk lies or belongs, or the link's own memory."""
        if index < len(body.buffers):
            return body.buffers[index]
        if self._memory.numel() < body.sizes[index]:
            self._memory = torch.empty(body.sizes[index], dtype=torch.uint8)
        return self._memory[: body.sizes[index]]

    def _move(self, stream: Stream[Body]) -> None:
        try:
            self._move_chunks(stream)
        except OSError:
            self._check(stream)  # its time is up, or the link was closed
            raise

    @abstractmethod
    def _move_chunks(self, stream: Stream[Body]) -> None: ...


class _OutLink(_TcpLink[Source]):
    """The sender's end."""

    def _next(self) -> Stream[Source] | None:
        return self._take_first()

    def _move_chunks(self, stream: Stream[Source]) -> None:
        body = stream.body
        connection = self._connect(stream)
        header = _header(self._here.endpoint, self._peer, stream.ticket, body.sizes)
        self._send(connection, header, self._until_s(stream))
        for index in range(len(body.sizes)):
            self._check(stream)
            chunk = body.read_chunk(index, self._buffer(body, index))
            self._send(connection, _bytes_of(chunk), self._until_s(stream))
        _await_data(connection, self._until_s(stream))
        if connection.recv(1) != _ACK:
            raise ConnectionError("the receiver ended the stream")

    def _connect(self, stream: Stream[Source]) -> socket.socket:
        """The connection that is there, unless the receiver has closed it meanwhile."""
        if self._connection is not None and not _has_data(self._connection, 0):
            return self._connection
        self._drop()
        address, until_s = (self._peer.host, self._peer.port), self._until_s(stream)
        connection = socket.create_connection(address, max(until_s - time.monotonic(), _PAUSE_S))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._changed:
            self._connection = connection
        return connection

    def _send(self, connection: socket.socket, data: bytes | memoryview, until_s: float) -> None:
        connection.settimeout(max(until_s - time.monotonic(), _PAUSE_S))  # for all of it
        connection.sendall(data)


class _InLink(_TcpLink[Sink]):
    """The receiver's end. It follows the order in which the sender starts."""

    def __init__(self, here: Site, peer: Endpoint) -> None:
        self._newer: socket.socket | None = None
        """A connection that the thread has not taken over yet."""
        super().__init__(here, peer)

    def connected(self, connection: socket.socket) -> None:
        """The sender has opened another connection: it uses no other any more."""
        with self._changed:
            if self._newer is not None:
                self._newer.close()
            self._newer = connection
            if self._closed:  # it made room for another link a moment ago
                self._newer.close()
            self._shut_down()
            self._changed.notify_all()

    def _drop(self) -> None:
        with self._changed:
            super()._drop()
            if self._closed and self._newer is not None:
                self._newer.close()
                self._newer = None

    def _next(self) -> Stream[Sink] | None:
        connection = self._current_connection()
        if connection is None:
            return None
        header = bytearray(_HEADER.size)
        self._fill(connection, memoryview(header), math.inf)
        if _sender_of(header, self._here.endpoint) != self._peer.name:
            raise TransferFailed(Cause.HEADER, f"{self._peer.host} sent a header of another process")
        *_, ticket, digest = _HEADER.unpack(header)
        with self._changed:
            self._changed.wait_for(
                lambda: ticket in self._waiting or self._closed or self._newer, self._patience_s
            )
            self._current = self._waiting.pop(ticket, None)
        if self._current is None:
            raise TransferFailed(Cause.DEADLINE, f"stream {ticket} came when nobody waited for it")
        if digest != _digest(self._current.body.sizes):
            raise TransferFailed(Cause.HEADER, f"stream {ticket} has other chunks than were agreed")
        return self._current

    def _current_connection(self) -> socket.socket | None:
        """Wait for one; None once the link is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._connection or self._newer or self._closed)
            if self._newer is not None:
                self._drop()
                self._connection, self._newer = self._newer, None
            if self._closed:
                return None
            return self._connection

    def _move_chunks(self, stream: Stream[Sink]) -> None:
        connection, body = self._connection, stream.body
        assert connection is not None
        for index in range(len(body.sizes)):
            buffer = self._buffer(body, index)
            self._fill(connection, _bytes_of(buffer), self._until_s(stream), stream)
            with stream.lock:
                self._check(stream)
                body.write_chunk(index, buffer)
        body.verify()
        with suppress(OSError):  # all is here, whether or not the sender learns of it
            connection.send(_ACK)

    def _fill(
        self,
        connection: socket.socket,
        memory: memoryview,
        until_s: float,
        stream: Stream[Sink] | None = None,
    ) -> None:
        """Fill `memory`. A thread that ends `stream` waits for one `recv` at most, which never blocks."""
        while memory:
            wanted = min(len(memory), _PIECE_BYTES)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            _await_data(connection, until_s)
            with stream.lock if stream else nullcontext():
                if stream is not None:
                    self._check(stream)
                count = connection.recv_into(memory)
            if count == 0:
                raise ConnectionError("the sender closed the connection")
            memory = memory[count:]


def _header(sender: Endpoint, receiver: Endpoint, ticket: Ticket, sizes: tuple[int, ...]) -> bytes:
    names = receiver.name.encode(), sender.name.encode()
    return _HEADER.pack(_PROTOCOL, *names, ticket, _digest(sizes))


def _sender_of(header: bytes | bytearray, here: Endpoint) -> str:
    """Its name. Raises TransferFailed if this is no header for this process."""
    if len(header) == _HEADER.size:
        protocol, receiver, sender, _, _ = _HEADER.unpack(header)
        if (protocol, receiver) == (_PROTOCOL, here.name.encode()) and sender.isalnum():
            name: str = sender.decode()
            return name
    raise TransferFailed(Cause.HEADER, "a connection began with what is no header for this process")


def _digest(sizes: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(repr(sizes).encode(), digest_size=16).digest()


def _bytes_of(chunk: Tensor) -> memoryview:
    return chunk.numpy().data


def _has_data(connection: socket.socket, timeout_s: float) -> bool:
    """Whether a read would return at once, with data or because the connection is closed."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(math.ceil(1000 * timeout_s) if timeout_s < math.inf else None))


def _await_data(connection: socket.socket, until_s: float) -> None:
    if not _has_data(connection, max(until_s - time.monotonic(), 0.0)):
        raise TimeoutError("the peer let a chunk wait for too long")
