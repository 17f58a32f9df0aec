"""Tells the directory what this replica holds: in batches, in the background, again if it has forgotten.

Knows no Ray: the directory is reached through a `Channel`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Protocol

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.directory import HINT_BYTES, Announcement
from quire.kvstore.peers.ids import ReplicaId

BATCH = 50_000
"""Hints an announcement carries at most: 400 kB."""


class ChannelLost(Exception):
    """The directory could not be reached; it may come back empty."""


class Channel(Protocol):
    """The way to the directory. Called from the announcer's thread, and may block it for a while."""

    def announce(self, said: Announcement) -> bool:
        """As `Directory.announce`. Raises ChannelLost."""


class Announcer:
    """What the engine calls (`added`, `removed`) never waits for the directory."""

    def __init__(
        self, owner: ReplicaId, channel: Channel, *, period_s: float = 0.1, idle_s: float = 5.0
    ) -> None:
        """Announces every `period_s` what changed, and every `idle_s` at least that the owner lives."""
        self._owner, self._channel, self._period_s, self._idle_s = owner, channel, period_s, idle_s
        self._held: set[bytes] = set()
        self._said: set[bytes] = set()
        self._changed: set[bytes] = set()
        self._number = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-announcer", daemon=True)
        self.losses = 0
        """How often the directory was lost or had forgotten this owner."""

    def start(self) -> None:
        self._thread.start()

    def added(self, keys: Iterable[BlockKey]) -> None:
        hints = [key[:HINT_BYTES] for key in keys]
        with self._lock:
            self._held.update(hints)
            self._changed.update(hints)

    def removed(self, keys: Iterable[BlockKey]) -> None:
        hints = [key[:HINT_BYTES] for key in keys]
        with self._lock:
            self._held.difference_update(hints)
            self._changed.update(hints)

    def flush(self) -> bool:
        """Announce a batch of what changed. False if the directory did not take it: all is repeated."""
        with self._lock:
            batch = [self._changed.pop() for _ in range(min(BATCH, len(self._changed)))]
            added = [hint for hint in batch if hint in self._held and hint not in self._said]
            removed = [hint for hint in batch if hint not in self._held and hint in self._said]
        said = Announcement(self._owner, self._number, b"".join(added), b"".join(removed))
        try:
            taken = self._channel.announce(said)
        except ChannelLost:
            taken = False
        if not taken:
            self._begin_anew()
            return False
        self._number += 1
        self._said.update(added)
        self._said.difference_update(removed)
        return True

    def close(self) -> None:
        """Stop announcing; the directory forgets this owner by its silence, or when told of its death."""
        self._closing.set()

    def _begin_anew(self) -> None:
        self.losses += 1
        self._number = 0
        self._said.clear()
        with self._lock:
            self._changed = set(self._held)

    def _run(self) -> None:
        idle_s = self._idle_s
        while not self._closing.wait(self._period_s):
            idle_s += self._period_s
            if self._changed or idle_s >= self._idle_s:
                idle_s = 0.0
                while self.flush() and self._changed:
                    pass
