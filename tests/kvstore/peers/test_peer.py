"""A replica among its peers: messages, failures and drains reach the exchange, and what follows is done."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from store_peers import StorePeer, fetch, keys_of, run

from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.peer import Peer
from quire.kvstore.wire.failures import Cause

KEYS = tuple(keys_of(12))


@pytest.fixture
def peers() -> Iterator[tuple[StorePeer, StorePeer]]:
    one, other = StorePeer(ReplicaId("one")), StorePeer(ReplicaId("other"), pages=16)
    one.cache(KEYS)
    yield one, other
    one.close()
    other.close()


def test_a_fetch_is_returned_once_when_it_is_over(peers):
    one, other = peers
    done = fetch(other, one, KEYS)
    assert (done.failure, done.blocks) == (None, len(KEYS))
    assert other.peer.poll(time.monotonic()) == []
    assert other.holds(KEYS)


def test_whoever_brings_news_wakes_the_owner(peers):
    woken: list[bool] = []
    me = peers[1]
    peer = Peer(me.pool, me.exchange, me, lambda to, message, failed: failed(), lambda: woken.append(True))
    assert not peer.has_news
    peer.on_peer_gone(ReplicaId("one"))
    assert peer.has_news
    assert woken == [True]
    peer.poll(time.monotonic())
    assert not peer.has_news


def test_a_message_that_cannot_be_sent_ends_what_was_expected_of_its_receiver(peers):
    me = peers[1]
    peer = Peer(me.pool, me.exchange, me, lambda to, message, failed: failed())
    me.exchange.fetch(ReplicaId("nobody"), KEYS, time.monotonic())
    assert peer.poll(time.monotonic()) == []  # the message goes out, and comes to nothing
    (done,) = peer.poll(time.monotonic())
    assert done.failure is Cause.PEER


def test_a_replica_that_is_drained_waits_until_the_others_have_what_they_want(peers):
    one, other = peers
    one.peer.used(KEYS)
    one.peer.drain([other.name])
    assert one.peer.is_draining
    run(peers, lambda: not one.peer.is_draining)
    assert other.holds(KEYS)


def test_what_is_drained_takes_free_pages_only(peers):
    one, other = peers
    own = keys_of(10, seed=1)
    other.cache(own)
    one.peer.used(KEYS)
    one.peer.drain([other.name])
    run(peers, lambda: not one.peer.is_draining)
    assert other.holds(own)
    assert other.holds(KEYS[:6])


def test_a_receiver_that_is_gone_holds_up_no_drain(peers):
    one = peers[0]
    peer = Peer(one.pool, one.exchange, one, lambda to, message, failed: failed())
    peer.used(KEYS)
    peer.drain([ReplicaId("gone")])
    assert peer.is_draining
    for _ in range(2):  # the offer goes out, and comes to nothing
        peer.poll(time.monotonic())
    assert not peer.is_draining
