"""A replica is killed or stopped in every state of a transfer: the other one loses that transfer alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil
import pytest
from store_peers import SIGNALS, STATES, StorePeer, fetch, keys_of, peer_process

from quire.kvstore.failures import Cause
from quire.kvstore.messages import Message, ReplicaId, from_bytes, to_bytes

KEYS = keys_of(16)
CHILD = ReplicaId("child")
STRIKES = [(side, state, how) for side, states in STATES.items() for state in states for how in SIGNALS]


@dataclass
class Child:
    """A replica in a process of its own, and this process's one beside it."""

    process: BaseProcess
    control: Connection
    me: StorePeer
    said: list[tuple[object, ...]]

    def tell(self, *what: object) -> None:
        self.control.send(what)

    def drive(self, until: Callable[[], bool], limit_s: float = 10) -> None:
        """Carry messages between the two until something is true here."""
        end_s = time.monotonic() + limit_s
        while not until():
            assert time.monotonic() < end_s, "it did not happen"
            self.me.turn(lambda to, message: self._carry(message))
            while (said := self._hear()) is not None:
                if said[0] == "message":
                    self.me.exchange.handle(CHILD, from_bytes(said[1]), time.monotonic())
                else:
                    self.said.append(said)
            time.sleep(0.001)

    def _carry(self, message: Message) -> None:
        try:
            self.tell("message", to_bytes(message))
        except BrokenPipeError:
            self._gone()

    def _hear(self) -> tuple[object, ...] | None:
        try:
            return self.control.recv() if self.control.poll(0) else None
        except (EOFError, ConnectionResetError):
            return self._gone()

    def _gone(self) -> None:
        self.me.exchange.peer_gone(CHILD, time.monotonic())


@contextmanager
def child(me: StorePeer, kv: str = "int8", tp: int = 1) -> Iterator[Child]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["byte_streams", "store_peers"])
    ours, theirs = context.Pipe()
    process = context.Process(target=peer_process, args=(theirs, kv, tp), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(60)
    assert ours.recv() == "ready"
    try:
        yield Child(process, ours, me, [])
    finally:
        process.kill()
        process.join()
        ours.close()


@pytest.fixture
def me() -> Iterator[StorePeer]:
    peer = StorePeer(ReplicaId("parent"), timeout_s=1.0)
    yield peer
    peer.close()


@pytest.fixture
def third() -> Iterator[StorePeer]:
    peer = StorePeer(ReplicaId("third"))
    peer.cache(KEYS)
    yield peer
    peer.close()


def ended(child: BaseProcess) -> bool:
    """It was killed, or it is stopped."""
    try:
        return psutil.Process(child.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("tp", [1, 2])
def test_blocks_move_between_processes_both_ways(me, kv, tp):
    me.close()
    here, theirs = StorePeer(ReplicaId("parent"), kv=kv), keys_of(9, seed=5)
    here.cache(KEYS)
    with child(here, kv, tp) as other:
        other.tell("cache", theirs)
        here.exchange.fetch(CHILD, theirs, time.monotonic())
        other.tell("fetch", KEYS)
        other.drive(lambda: bool(here.fetched) and bool(other.said))
        assert here.fetched[0].failure is None
        assert here.holds(theirs)
        assert other.said == [("fetched", "None", True)]
        other.tell("check")
        other.drive(lambda: len(other.said) > 1 and here.pool.used == 0)
        assert other.said[1] == ("used", 0)
        here.check()
    here.close()


@pytest.mark.parametrize(("side", "state", "how"), STRIKES)
def test_a_replica_struck_in_any_state_costs_its_peer_one_transfer(me, third, side, state, how):
    with child(me) as other:
        other.tell("strike", state, SIGNALS[how])
        started = time.monotonic()
        if side == "owner":
            other.tell("cache", KEYS)
            me.exchange.fetch(CHILD, KEYS, started)
            other.drive(lambda: bool(me.fetched))
            assert me.fetched[0].failure in (Cause.DEADLINE, Cause.PEER)
            assert (
                time.monotonic() - started < 1.9
            )  # the deadline is 1 s; a link's operation would be another
            assert me.pool.lookup(KEYS) == (0, 0)
        else:
            me.cache(KEYS)
            other.tell("fetch", KEYS)
            other.drive(lambda: ended(other.process))
        assert ended(other.process)
        other.drive(lambda: me.pool.used == 0, 3)  # a lease of 2 s at most
        me.check()
        keys = KEYS if side == "owner" else keys_of(5, seed=9)
        third.cache(keys) if side != "owner" else None
        assert fetch(me, third, keys).failure is None
        assert me.holds(keys)


@pytest.mark.parametrize("state", ["send 0", "send 3"])
def test_an_owner_that_was_stopped_and_goes_on_is_fetched_from_again(me, state):
    with child(me) as other:
        other.tell("cache", KEYS)
        other.tell("strike", state, signal.SIGSTOP)
        me.exchange.fetch(CHILD, KEYS, time.monotonic())
        other.drive(lambda: bool(me.fetched))
        assert me.fetched[0].failure is not None
        assert other.process.pid is not None
        os.kill(other.process.pid, signal.SIGCONT)
        for _ in range(3):  # what the stopped shard had begun may still be in the way once
            me.fetched.clear()
            me.exchange.fetch(CHILD, KEYS, time.monotonic())
            other.drive(lambda: bool(me.fetched))
            if me.fetched[0].failure is None:
                break
        assert me.holds(KEYS)
        me.check()


def test_a_receiver_that_was_stopped_too_long_publishes_nothing_stale(me):
    """It was stopped after all had arrived, before the owner's word; the lease ended and pages changed."""
    me.cache(KEYS)
    with child(me) as other:
        other.tell("strike", "released", signal.SIGSTOP)
        other.tell("fetch", KEYS)
        other.drive(lambda: ended(other.process))
        me.pool.release(me.pool.allocate(me.pages))
        me.shards[0].pool_NB.zero_()
        time.sleep(2.2)
        assert other.process.pid is not None
        os.kill(other.process.pid, signal.SIGCONT)
        other.drive(lambda: bool(other.said))
        _, failure, right = other.said[0]
        assert failure != "None" or right
