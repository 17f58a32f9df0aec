"""One stream of chunks, sent or received, and the promise of its end."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.transport import Endpoint, Sink, Source, Ticket

Body = TypeVar("Body", Source, Sink)


@dataclass(eq=False)
class Stream(Generic[Body]):
    """A stream. The first call of `end` decides how it ended."""

    peer: Endpoint
    ticket: Ticket
    body: Body
    deadline_s: float
    synchronize: Callable[[], None] = lambda: None
    """The sink's."""
    future: Future[None] = field(default_factory=Future)
    connection: socket.socket | None = None
    """Closed by the stream's thread; other threads only shut it down."""
    ended: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held by the stream's thread whenever it writes into the sink's memory."""

    def begin(self, connection: socket.socket) -> None:
        """Move the chunks over this connection. Raises TransferFailed if the stream has ended."""
        with self.lock:
            self.connection = connection
            self.check()

    def end(self, error: Exception | None = None) -> None:
        """End the stream. Waits for a write into the sink's memory; afterwards nothing is written there."""
        with self.lock:
            if self.ended:
                return
            self.ended = True
            if self.connection is not None:
                with suppress(OSError):  # the peer may have closed it
                    self.connection.shutdown(socket.SHUT_RDWR)  # so that no thread waits in it any more
            self.synchronize()
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._failure(error))

    def check(self) -> None:
        """Raise TransferFailed if the stream has ended, or its time is over."""
        if self.ended or time.monotonic() > self.deadline_s:
            raise self.overdue()

    def until_s(self, patience_s: float) -> float:
        """Return when the next operation has to be over. Raises TransferFailed as `check` does."""
        self.check()
        return min(time.monotonic() + patience_s, self.deadline_s)

    def overdue(self) -> TransferFailed:
        """Return the failure of a stream that has no time left."""
        return TransferFailed(Cause.DEADLINE, f"{self.peer.host}: stream {self.ticket} was not done in time")

    def _failure(self, error: Exception) -> TransferFailed:
        if not isinstance(error, TransferFailed):
            late = time.monotonic() >= self.deadline_s
            reason = f"{self.peer.host}: {reason_of(error)}"
            error = self.overdue() if late else TransferFailed(Cause.PEER, reason)
        error.__context__ = error.__cause__ = None  # whose frames would keep memory alive
        return error.with_traceback(None)


def reason_of(error: Exception) -> str:
    """Return what an error says, without torch's source lines and advice."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[/\S+\] |\. This is typically.*", "", first)
