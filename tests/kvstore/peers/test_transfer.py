"""A replica is killed or stopped in every state of a transfer: the other one loses that transfer alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from store_child import CHILD, child, ended
from store_peers import SIGNALS, STATES, StorePeer, fetch, keys_of

from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.wire.failures import Cause

KEYS = keys_of(16)
STRIKES = [(side, state, how) for side, states in STATES.items() for state in states for how in SIGNALS]


@pytest.fixture
def me() -> Iterator[StorePeer]:
    peer = StorePeer(ReplicaId("parent"), timeout_s=2.0)
    yield peer
    peer.close()


@pytest.fixture
def third() -> Iterator[StorePeer]:
    peer = StorePeer(ReplicaId("third"))
    peer.cache(KEYS)
    yield peer
    peer.close()


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
            assert time.monotonic() - started < 10  # the deadline is 2 s, and the machine may be busy
            assert me.pool.lookup(KEYS) == (0, 0)
        else:
            me.cache(KEYS)
            other.tell("fetch", KEYS)
        other.drive(lambda: ended(other.process))  # its pipe may end a moment before it does
        other.drive(lambda: me.pool.used == 0)  # a lease of 3 s at most
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
        time.sleep(3.3)
        assert other.process.pid is not None
        os.kill(other.process.pid, signal.SIGCONT)
        other.drive(lambda: bool(other.said))
        _, failure, right = other.said[0]
        assert failure != "None" or right
