"""Links over NCCL between processes: on two GPUs, or on one that pretends to be in two hosts.

NCCL refuses two ranks on one GPU of one host; with a host name of its own each, they talk through sockets.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from store_child import CHILD, child, ended
from store_peers import GPU_PATIENCE_S, SIGNALS, STATES, StorePeer, keys_of

from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.wire.failures import Cause

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KEYS = keys_of(16)
STRIKES = [(side, state, how) for side, states in STATES.items() for state in states for how in SIGNALS]
LIMIT_S = 30.0
GPUS = torch.cuda.device_count()
HERE, THERE = torch.device("cuda", 0), f"cuda:{min(GPUS, 2) - 1}"
OTHER_HOST = {} if GPUS > 1 else {"NCCL_HOSTID": "child", "NCCL_SOCKET_IFNAME": "lo"}


def peer(kv: str) -> StorePeer:
    return StorePeer(ReplicaId("parent"), kv=kv, device=HERE, **GPU_PATIENCE_S)


@pytest.fixture(autouse=True, scope="module")
def host_of_its_own() -> None:
    """For good: NCCL reads it once."""
    if GPUS == 1:
        os.environ.update(OTHER_HOST | {"NCCL_HOSTID": "parent"})


@pytest.fixture
def me() -> Iterator[StorePeer]:
    peer_of_mine = peer("int8")
    yield peer_of_mine
    peer_of_mine.close()


@pytest.mark.parametrize("kv", ["int8", "int4", "bf16"])
def test_blocks_move_between_gpus_both_ways(kv):
    here, theirs = peer(kv), keys_of(9, seed=5)
    here.cache(KEYS)
    with child(here, kv, 1, THERE, OTHER_HOST) as other:
        other.tell("cache", theirs)
        here.exchange.fetch(CHILD, theirs, time.monotonic())
        other.tell("fetch", KEYS)
        other.drive(lambda: bool(here.fetched) and bool(other.said), LIMIT_S)
        assert here.fetched[0].failure is None, here.fetched[0].reason
        assert here.holds(theirs)
        assert other.said == [("fetched", "None", True)]
        other.tell("check")
        other.drive(lambda: len(other.said) > 1 and here.pool.used == 0)
        assert other.said[1] == ("used", 0)
        here.check()
    here.close()


@pytest.mark.parametrize(("side", "state", "how"), STRIKES)
def test_a_replica_struck_in_any_state_costs_its_peer_one_transfer(me, side, state, how):
    with child(me, "int8", 1, THERE, OTHER_HOST) as other:
        other.tell("strike", state, SIGNALS[how])
        started = time.monotonic()
        if side == "owner":
            other.tell("cache", KEYS)
            me.exchange.fetch(CHILD, KEYS, started)
            other.drive(lambda: bool(me.fetched), LIMIT_S)
            assert me.fetched[0].failure in (Cause.DEADLINE, Cause.PEER)
            assert time.monotonic() - started < GPU_PATIENCE_S["timeout_s"] + 2
        else:
            me.cache(KEYS)
            other.tell("fetch", KEYS)
        other.drive(lambda: ended(other.process), LIMIT_S)  # its pipe may end a moment before it does
        other.drive(lambda: me.pool.used == 0, 2 * GPU_PATIENCE_S["timeout_s"])
        me.check()
    me.turn()  # the last news of the one that is gone, whose name the next one has
    me.fetched.clear()
    theirs = keys_of(5, seed=9)
    with child(me, "int8", 1, THERE, OTHER_HOST) as third:  # the GPU and the process are as good as before
        third.tell("cache", theirs)
        me.exchange.fetch(CHILD, theirs, time.monotonic())
        third.drive(lambda: bool(me.fetched), LIMIT_S)
        assert me.fetched[0].failure is None, me.fetched[0].reason
        assert me.holds(theirs)


def test_an_owner_that_was_stopped_and_goes_on_is_fetched_from_again(me):
    with child(me, "int8", 1, THERE, OTHER_HOST) as other:
        other.tell("cache", KEYS)
        other.tell("strike", "send 3", signal.SIGSTOP)
        me.exchange.fetch(CHILD, KEYS, time.monotonic())
        other.drive(lambda: bool(me.fetched), LIMIT_S)
        assert me.fetched[0].failure is not None
        assert other.process.pid is not None
        os.kill(other.process.pid, signal.SIGCONT)
        for _ in range(3):  # what the stopped shard had begun may still be in the way once
            me.fetched.clear()
            me.exchange.fetch(CHILD, KEYS, time.monotonic())
            other.drive(lambda: bool(me.fetched), LIMIT_S)
            if me.fetched[0].failure is None:
                break
        assert me.holds(KEYS)
        me.check()
