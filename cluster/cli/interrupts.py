"""Ctrl-C and SIGTERM to `quire serve`: noticed at once, also while the main thread is in native code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EXIT_CODE = 130


class Interrupts:
    """Ends the process at a signal; once `orderly`, the first raises KeyboardInterrupt in the main thread.

    Python runs handlers when native code returns, which in Ray's start can take half a minute. So a thread
    reads the signals' numbers from a pipe that Python's C handler writes to. A Ray that this process started
    ends with it.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is called from a thread with what is going on. To be made in the main thread."""
        self._say = say
        self._orderly = self._raised = False
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes)
        self._handle()
        threading.Thread(target=self._listen, args=(reads,), daemon=True).start()

    def orderly(self) -> None:
        """From now on there is something to take down. Replaces Ray's handlers, which abort."""
        self._orderly = True
        self._handle()

    def _handle(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._orderly and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _listen(self, reads: int) -> None:
        heard = 0
        while True:
            heard += sum(number in _SIGNALS for number in os.read(reads, 16))
            if heard > 1 or (heard and not self._orderly):
                self._say("ended")
                os._exit(_EXIT_CODE)
            if heard:
                self._say("stopping; Ctrl-C again ends without waiting")
