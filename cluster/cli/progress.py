"""What a command that takes long is doing: its phase and the seconds so far, on standard error."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_REDRAW_S = 0.5
_REPEAT_S = 15.0
"""How often a phase that lasts is printed again where a line cannot be redrawn."""


def standard_error() -> TextIO:
    """Standard error as it is now, whatever becomes of file descriptor 2."""
    return open(os.dup(2), "w")


class Progress:
    """Redraws one line on a terminal; elsewhere it prints a line for each phase, and now and then another.

    A context. Calling it begins a phase, like "loading weights: 8/272 tensors"; its name ends at the colon.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._start_s = self._printed_s = clock()
        self._phase, self._printed = "", ""
        self._lock = threading.RLock()  # a signal's handler may begin a phase while one is being drawn
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._phase = ""
            self._clear()

    def __call__(self, phase: str) -> None:
        with self._lock:
            self._phase = phase
            self.draw()

    def say(self, line: str) -> None:
        """Ends the phase and prints a line that stays."""
        with self._lock:
            self._phase = ""
            self._clear()
            print(line, file=self._out, flush=True)

    def draw(self) -> None:
        """Shows the phase if it is time to; a thread calls this twice a second."""
        with self._lock:
            if not self._phase:
                return
            now_s = self._clock()
            line = f"{now_s - self._start_s:4.0f} s  {self._phase}"
            if self._out.isatty():
                columns = shutil.get_terminal_size().columns
                print(f"\r\x1b[K{line[: columns - 1]}", end="", file=self._out, flush=True)
                return
            name = self._phase.partition(":")[0]
            if name != self._printed or now_s - self._printed_s >= _REPEAT_S:
                self._printed, self._printed_s = name, now_s
                print(line, file=self._out, flush=True)

    def _clear(self) -> None:
        if self._out.isatty():
            print("\r\x1b[K", end="", file=self._out, flush=True)

    def _redraw(self) -> None:
        while not self._ended.wait(_REDRAW_S):
            self.draw()
