"""Limits the bytes a shard sends per second, so that steps keep their share of the network."""

from __future__ import annotations

import threading
import time


class Bandwidth:
    """A token bucket that all links of a shard draw from, in order.

    A link must send its next chunk well within the links' operation timeout, or its receiver gives up:
    `bytes_per_s * operation_timeout_s` exceeds the chunks of all links that are busy at once.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: int) -> None:
        if bytes_per_s <= 0 or burst_bytes < 1:
            raise ValueError(f"a bandwidth bound is positive, got {bytes_per_s} bytes/s, burst {burst_bytes}")
        self._rate, self._burst = bytes_per_s, burst_bytes
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def reserve(self, count: int, now_s: float) -> float:
        """Reserve `count` bytes, and return how many seconds to wait before sending them."""
        with self._lock:
            # The bucket is full when nothing was reserved for the time that its burst takes.
            start_s = max(self._free_at_s, now_s - self._burst / self._rate)
            self._free_at_s = start_s + count / self._rate
            return max(self._free_at_s - now_s, 0.0)

    def wait(self, count: int) -> None:
        """Block until `count` bytes may be sent."""
        time.sleep(self.reserve(count, time.monotonic()))
