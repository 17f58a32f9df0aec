"""Announcements: batched, in the background, and anew when the directory has forgotten."""

from __future__ import annotations

import threading
import time

from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.peers.announcer import Announcer, ChannelLost
from quire.kvstore.peers.directory import Announcement, Directory, Holder
from quire.kvstore.peers.ids import ReplicaId

A = ReplicaId("a")


class Here:
    """A channel to a directory of this process, which can be lost and replaced."""

    def __init__(self) -> None:
        self.directory: Directory | None = Directory(10_000)
        self.said: list[Announcement] = []

    def announce(self, said: Announcement) -> bool:
        if self.directory is None:
            raise ChannelLost
        self.said.append(said)
        return self.directory.announce(said, 0.0)


def chain(blocks: int, seed: int = 0) -> list[BlockKey]:
    return extend_chain(KeySpace(b"l", b"m", b"t").root(str(seed)), list(range(16 * blocks)), 16)


def test_what_changed_is_announced_once_and_together():
    here, keys = Here(), chain(5)
    announcer = Announcer(A, here)
    announcer.added(keys[:4])
    announcer.added(keys[3:])
    announcer.removed(keys[4:])
    assert announcer.flush()
    assert here.directory.lookup(keys) == (Holder(A, 4),)
    assert [len(s.added) for s in here.said] == [4 * 8]
    announcer.removed(keys[2:4])
    announcer.flush()
    assert here.directory.lookup(keys) == (Holder(A, 2),)


def test_a_directory_that_died_is_filled_again():
    here, keys = Here(), chain(5)
    announcer = Announcer(A, here)
    announcer.added(keys)
    announcer.flush()
    here.directory = None
    announcer.removed(keys[4:])
    assert not announcer.flush()
    here.directory = Directory(10_000)
    assert announcer.flush()
    assert here.directory.lookup(keys) == (Holder(A, 4),)
    assert announcer.losses == 1


def test_a_directory_that_came_back_empty_asks_for_everything():
    here, keys = Here(), chain(5)
    announcer = Announcer(A, here)
    announcer.added(keys)
    announcer.flush()
    here.directory = Directory(10_000)
    announcer.added(chain(1, seed=1))
    assert not announcer.flush()
    assert announcer.flush()
    assert here.directory.lookup(keys) == (Holder(A, 5),)


def test_a_directory_that_hangs_holds_nobody_up():
    hangs, keys = threading.Event(), chain(5)

    class Hanging(Here):
        def announce(self, said: Announcement) -> bool:
            hangs.wait(5)
            return super().announce(said)

    here = Hanging()
    announcer = Announcer(A, here, period_s=0.01)
    announcer.start()
    started = time.monotonic()
    for _ in range(100):
        announcer.added(keys)
        time.sleep(0.001)
    assert time.monotonic() - started < 1
    hangs.set()
    while not here.directory.lookup(keys):
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    announcer.close()
