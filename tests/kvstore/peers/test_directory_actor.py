"""The directory as an actor of a real Ray: found by everybody, made again after its death, filled again."""

from __future__ import annotations

import time

import pytest
import ray

from quire.kvstore.books.keys import KeySpace, extend_chain
from quire.kvstore.peers.announcer import Announcer, ChannelLost
from quire.kvstore.peers.directory import Holder
from quire.kvstore.peers.directory_actor import NAMESPACE, RayDirectory, end_directory
from quire.kvstore.peers.ids import ReplicaId

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined")]

KEYS = extend_chain(KeySpace(b"l", b"m", b"t").root(), list(range(80)), 16)


def test_a_directory_that_is_killed_is_made_again_and_filled_again():
    ours = RayDirectory("app", max_entries=10_000, timeout_s=60.0)
    announcer = Announcer(ReplicaId("a"), ours, period_s=0.02)
    announcer.start()
    announcer.added(KEYS)
    theirs = RayDirectory("app", max_entries=10_000, timeout_s=60.0)  # as another process finds it
    _until_held(theirs)
    ray.kill(ray.get_actor("app-directory", namespace=NAMESPACE))
    announcer.removed(KEYS[3:])
    while _answers(theirs):
        time.sleep(0.01)
    announcer.added(KEYS[3:])
    _until_held(theirs)
    assert announcer.losses >= 1
    assert theirs.stats().owners == 1
    announcer.close()
    end_directory("app")
    end_directory("app")


def test_a_directory_that_nobody_announces_to_ends_by_itself():
    directory = RayDirectory("left", max_entries=10_000, silence_s=2.0, timeout_s=60.0)
    announcer = Announcer(ReplicaId("a"), directory, period_s=0.02, idle_s=0.2)
    announcer.start()
    announcer.added(KEYS)
    _until_held(directory)
    time.sleep(5.0)
    assert directory.owners() == (ReplicaId("a"),)  # announcements, even empty ones, keep it
    announcer.close()
    end_s = time.monotonic() + 120
    while _is_there("left"):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def _is_there(deployment: str) -> bool:
    try:
        ray.get_actor(f"{deployment}-directory", namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _answers(directory: RayDirectory) -> bool:
    try:
        directory.lookup(KEYS)
    except ChannelLost:
        return False
    return True


def _until_held(directory: RayDirectory) -> None:
    end_s = time.monotonic() + 120
    while directory.lookup(KEYS) != (Holder(ReplicaId("a"), len(KEYS)),):
        assert time.monotonic() < end_s
        time.sleep(0.02)
