"""One send or receive on a link, and the promise of its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.transport import Sink, Source, Ticket

Body = TypeVar("Body", Source, Sink)


@dataclass(eq=False)
class Stream(Generic[Body]):
    """The first call of `end` decides how it ended."""

    ticket: Ticket
    body: Body
    deadline_s: float
    future: Future[None] = field(default_factory=Future)
    synchronize: Callable[[], None] = lambda: None
    """That of the sink."""
    ended: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held by the link's thread whenever it writes into the sink's memory."""

    def end(self, error: TransferFailed | None = None) -> None:
        """End the stream. Waits for a write into the sink's memory; afterwards nothing is written there."""
        with self.lock:
            if self.ended:
                return
            self.ended = True
            self.synchronize()
        if error is None:
            self.future.set_result(None)
        else:
            error.__context__ = error.__cause__ = None  # whose frames would keep groups alive
            self.future.set_exception(error.with_traceback(None))

    def check(self) -> None:
        if self.ended or time.monotonic() > self.deadline_s:
            raise TransferFailed(Cause.DEADLINE, f"stream {self.ticket} was not done in time")
