"""What a stream begins with, and the listener that accepts connections which begin with it.

Connections that do not begin by naming this process are closed. None of them has a thread.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from quire.kvstore.wire.transport import Endpoint, Ticket

_HEADER = struct.Struct("<8s16s16sQ16s")
_PROTOCOL = b"quire-2\n"
NAME_BYTES = 8
"""Bytes of a process's name, which is written as twice as many hexadecimal digits."""
_MAX_PENDING = 64
"""Connections that have not sent a header yet; the oldest makes room."""
_PAUSE_S = 0.001


class Header(NamedTuple):
    """Who sends which stream to whom."""

    protocol: bytes
    receiver: bytes
    sender: bytes
    ticket: Ticket
    digest: bytes
    """Of the sizes of the stream's chunks."""

    @staticmethod
    def of(sender: Endpoint, receiver: Endpoint, ticket: Ticket, sizes: tuple[int, ...]) -> Header:
        """Return the header of a stream."""
        return Header(_PROTOCOL, receiver.name.encode(), sender.name.encode(), ticket, digest_of(sizes))

    def to_bytes(self) -> bytes:
        """Return what goes over the connection before the chunks."""
        return _HEADER.pack(*self)


def digest_of(sizes: tuple[int, ...]) -> bytes:
    """Return what both ends compare before the first chunk."""
    return hashlib.blake2b(repr(sizes).encode(), digest_size=16).digest()


class Listener:
    """Accepts connections and hands on those that begin with a valid header."""

    def __init__(
        self, host: str, name: str, patience_s: float, connected: Callable[[Header, socket.socket], None]
    ) -> None:
        """`connected` is called by the listener's thread, and owns the connection from then on."""
        self._socket = socket.create_server((host, 0), backlog=_MAX_PENDING)
        self.port: int = self._socket.getsockname()[1]
        self._expected = (_PROTOCOL, name.encode())
        self._patience_s, self._connected = patience_s, connected
        self._pending: dict[socket.socket, float] = {}
        """Connections without a header yet, and until when they may send one; the oldest first."""
        self._selector = selectors.DefaultSelector()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="quire-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. May be called twice."""
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
        try:
            header = Header(*_HEADER.unpack(connection.recv(_HEADER.size)))
        except (OSError, struct.error):  # it was reset, or closed amid its header
            header = None
        if header is not None and header[:2] == self._expected and header.sender.isalnum():
            self._connected(header, connection)
        else:
            connection.close()
