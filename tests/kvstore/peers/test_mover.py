"""Blocks between replicas of one process: every pairing of sizes, every kind of damage."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait

import pytest
import torch
from store_peers import ALONE, HEADS, PACKED, StorePeer, fetch, keys_of, run
from torch import Tensor

from quire.kernels.page_copy import checksum_pages
from quire.kvstore.peers import mover
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.page_headers import HEADER_BYTES
from quire.kvstore.wire.failures import Cause, TransferFailed

KEYS = keys_of(12)


@pytest.fixture
def peers() -> Iterator[tuple[StorePeer, StorePeer]]:
    owner, receiver = StorePeer(ReplicaId("owner")), StorePeer(ReplicaId("receiver"))
    owner.cache(KEYS)
    yield owner, receiver
    owner.close()
    receiver.close()


def settled(*peers: StorePeer) -> None:
    """No page is held or pinned any more, and the books are right."""
    run(peers, lambda: all(peer.pool.used == 0 for peer in peers), 5)
    for peer in peers:
        peer.check()


@pytest.mark.parametrize("chunk_bytes", [PACKED, ALONE])
@pytest.mark.parametrize("kv", ["bf16", "int8", "int4", "k8v4"])
def test_a_block_arrives_byte_for_byte_in_every_format(kv, chunk_bytes):
    owner, receiver = (
        StorePeer(ReplicaId(name), kv=kv, chunk_bytes=chunk_bytes) for name in ("owner", "receiver")
    )
    owner.cache(KEYS)
    done = fetch(receiver, owner, KEYS)
    assert (done.failure, done.blocks) == (None, len(KEYS))
    assert receiver.holds(KEYS)
    page_bytes = owner.shards[0].layout.page_bytes
    assert done.bytes_moved == len(KEYS) * page_bytes
    settled(owner, receiver)
    owner.close()
    receiver.close()


@pytest.mark.parametrize("chunk_bytes", [PACKED, ALONE // 8])
@pytest.mark.parametrize("source_tp", [1, 2, 4, 8])
@pytest.mark.parametrize("destination_tp", [1, 2, 4, 8])
def test_blocks_move_between_any_two_tensor_parallel_sizes(source_tp, destination_tp, chunk_bytes):
    """4 kv heads: with 8 shards, every head lies on two of them."""
    patient = {"timeout_s": 5, "patience_s": 2, "chunk_bytes": chunk_bytes}
    owner = StorePeer(ReplicaId("owner"), tp=source_tp, **patient)
    receiver = StorePeer(ReplicaId("receiver"), tp=destination_tp, **patient)
    owner.cache(KEYS)
    done = fetch(receiver, owner, KEYS)
    assert done.failure is None, done.reason
    assert receiver.holds(KEYS)
    copies = max(destination_tp // HEADS, 1)
    assert done.bytes_moved == len(KEYS) * HEADS * owner.shards[0].layout.head_bytes * copies
    settled(owner, receiver)
    owner.close()
    receiver.close()


def test_what_the_receiver_has_already_keeps_its_page(peers):
    owner, receiver = peers
    pages = receiver.cache(KEYS[:3])
    assert fetch(receiver, owner, KEYS).failure is None
    assert receiver.pool.share(KEYS[:3]) == pages
    assert receiver.holds(KEYS)


def test_several_transfers_are_under_way_at_once_in_both_directions(peers):
    owner, receiver = peers
    theirs = [keys_of(5, seed) for seed in range(1, 4)]
    for keys in theirs:
        receiver.cache(keys)
        owner.exchange.fetch(receiver.name, keys, time.monotonic())
    receiver.exchange.fetch(owner.name, KEYS[:5], time.monotonic())
    receiver.exchange.fetch(owner.name, KEYS, time.monotonic())
    run(peers, lambda: len(owner.fetched) == 3 and len(receiver.fetched) == 2)
    assert receiver.holds(KEYS)
    assert all(owner.holds(keys) for keys in theirs)
    settled(*peers)


PAGES, HEADERS = 1, 3
"""Two of the chunks in which twelve blocks are sent: the last one has the headers."""


def flip(at: int, where: int = PAGES) -> object:
    def change(index: int, chunk: Tensor) -> None:
        if index == where:
            chunk[at] ^= 1

    return change


@pytest.mark.parametrize(
    ("where", "at", "cause"),
    [
        (PAGES, -1, Cause.CHECKSUM),
        (HEADERS, 3, Cause.HEADER),
        (HEADERS, 40, Cause.HEADER),
        (HEADERS, 64, Cause.HEADER),
        (HEADERS, 72, Cause.HEADER),
        (HEADERS, 80, Cause.CHECKSUM),
    ],
    ids=["page", "key", "layout", "head", "generation", "checksum"],
)
def test_a_damaged_byte_is_noticed_before_anybody_can_read_it(peers, where, at, cause):
    owner, receiver = peers
    owner.transports[0].read_chunk = flip(at, where)
    done = fetch(receiver, owner, KEYS)
    assert (done.failure, done.blocks) == (cause, 0)
    assert receiver.pool.lookup(KEYS) == (0, 0)
    settled(*peers)
    owner.transports[0].read_chunk = None
    assert fetch(receiver, owner, KEYS).failure is None
    assert receiver.holds(KEYS)


def test_a_byte_of_a_large_page_that_changed_in_the_owners_memory_is_noticed():
    """Since the page was first sent: its checksum is from then."""
    owner, *others = (StorePeer(ReplicaId(name), chunk_bytes=ALONE) for name in ("owner", "one", "two"))
    page = owner.cache(KEYS)[2]
    assert fetch(others[0], owner, KEYS).failure is None
    owner.shards[0].pool_NB[page, 5] ^= 1
    assert fetch(others[1], owner, KEYS).failure is Cause.CHECKSUM
    settled(owner, *others)
    for peer in (owner, *others):
        peer.close()


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_sums_that_were_made_ahead_are_not_made_again_for_as_many_shards(tp, monkeypatch):
    """On 8 shards every head lies on two. Other sizes ask for other parts of a page, summed then."""
    size = {"chunk_bytes": ALONE // 8, "timeout_s": 5.0, "patience_s": 2.0}
    owner, equal = (StorePeer(ReplicaId(name), tp=tp, **size) for name in ("owner", "equal"))
    other = StorePeer(ReplicaId("other"), tp=4, **size)
    owner.cache(KEYS)
    for mover_ in owner.movers:
        wait(mover_.precompute_checksums(owner.complete(KEYS)))
    made: list[Tensor] = []
    monkeypatch.setattr(
        mover, "_sum", lambda bytes_B: made.append(bytes_B) or int(checksum_pages(bytes_B[None]))
    )
    assert fetch(equal, owner, KEYS).failure is None
    assert equal.holds(KEYS)
    assert made == []
    assert fetch(other, owner, KEYS).failure is None
    assert other.holds(KEYS)
    assert bool(made) == (tp < 4)  # 8 shards and 4 send single heads alike
    for peer in (owner, equal, other):
        peer.close()


def test_a_byte_that_changed_since_its_sum_was_made_ahead_is_noticed():
    owner, receiver = (StorePeer(ReplicaId(name), chunk_bytes=ALONE) for name in ("owner", "receiver"))
    page = owner.cache(KEYS)[2]
    wait(owner.movers[0].precompute_checksums(owner.complete(KEYS)))
    owner.shards[0].pool_NB[page, 5] ^= 1
    assert fetch(receiver, owner, KEYS).failure is Cause.CHECKSUM
    settled(owner, receiver)
    owner.close()
    receiver.close()


def test_nothing_is_summed_ahead_where_pages_are_packed(peers):
    assert not peers[0].movers[0].precomputes_checksums
    assert peers[0].movers[0].precompute_checksums(peers[0].complete(KEYS)) == []


def test_sums_that_are_slow_make_a_transfer_slow_and_do_not_fail_it(monkeypatch):
    """All together they take longer than a link waits for one chunk."""

    def slowly(bytes_MB):
        time.sleep(0.08)
        return checksum_pages(bytes_MB)

    owner, receiver = (
        StorePeer(ReplicaId(name), chunk_bytes=ALONE, patience_s=0.5) for name in ("owner", "receiver")
    )
    owner.cache(KEYS)
    monkeypatch.setattr(mover, "checksum_pages", slowly)
    assert fetch(receiver, owner, KEYS).failure is None
    assert receiver.holds(KEYS)
    owner.close()
    receiver.close()


def test_sums_made_ahead_keep_no_transfer_waiting(monkeypatch):
    """As many as a long prefix has that came back from host memory, all before what a peer asks for."""

    def slowly(bytes_B: Tensor) -> int:
        time.sleep(0.1)
        return int(checksum_pages(bytes_B[None]))

    monkeypatch.setattr(mover, "_sum", slowly)
    owner, receiver = (
        StorePeer(ReplicaId(name), chunk_bytes=ALONE, patience_s=0.5) for name in ("owner", "receiver")
    )
    others = keys_of(40, seed=1)
    owner.cache(others)
    owner.cache(KEYS)
    ahead = owner.movers[0].precompute_checksums(owner.complete(others + KEYS))
    assert fetch(receiver, owner, KEYS).failure is None
    assert receiver.holds(KEYS)
    assert not ahead[len(others) - 1].done()
    for future in ahead:
        future.cancel()
    owner.close()
    receiver.close()


def test_a_page_that_holds_another_block_now_has_another_checksum():
    owner, receiver = (StorePeer(ReplicaId(name), chunk_bytes=ALONE, pages=12) for name in ("owner", "one"))
    for seed in range(3):
        owner.cache(keys_of(12, seed))  # there is no room for two
        assert fetch(receiver, owner, keys_of(12, seed)).failure is None
        assert receiver.holds(keys_of(12, seed))
    owner.close()
    receiver.close()


def test_an_owner_that_lies_about_its_layout_is_noticed(peers):
    liar = StorePeer(ReplicaId("liar"), kv="int4", claims="int8")
    liar.cache(KEYS)
    done = fetch(peers[1], liar, KEYS)
    assert done.failure is Cause.HEADER
    settled(peers[1], liar)
    liar.close()


def test_another_layout_is_refused(peers):
    other = StorePeer(ReplicaId("other"), kv="int4")
    assert fetch(other, peers[0], KEYS).failure is Cause.REFUSED
    other.close()


def test_pages_rewritten_after_the_lease_ended_are_not_believed(peers):
    """The owner was stopped for so long that its lease ended; its shard sends what is in the pages now."""
    owner, receiver = peers

    def rewrite(index: int, chunk: Tensor) -> None:
        if index == 0:
            owner.pool.expire_leases(time.monotonic() + 100)
            owner.pool.release(owner.pool.allocate(owner.pages))
            owner.shards[0].pool_NB.zero_()

    owner.transports[0].read_chunk = rewrite
    assert fetch(receiver, owner, KEYS).failure is Cause.LEASE
    assert receiver.pool.lookup(KEYS) == (0, 0)
    settled(*peers)


def test_a_block_evicted_before_the_offer_comes_is_not_sent(peers):
    owner, receiver = peers
    receiver.exchange.fetch(owner.name, KEYS, time.monotonic())
    owner.pool.release(owner.pool.allocate(owner.pages - 4))  # a directory that is out of date
    run(peers, lambda: bool(receiver.fetched))
    assert receiver.fetched[0].blocks == 4
    assert receiver.holds(KEYS[:4])
    settled(*peers)


def test_a_lost_offer_ends_at_the_deadline(peers):
    owner, receiver = peers
    started = time.monotonic()
    receiver.exchange.fetch(owner.name, KEYS, started)
    receiver.turn()
    run(peers, lambda: bool(receiver.fetched))
    assert receiver.timeout_s - 0.1 < time.monotonic() - started
    assert receiver.fetched[0].failure is Cause.DEADLINE
    assert fetch(receiver, owner, KEYS).failure is None


def test_headers_are_less_than_a_hundredth_of_what_moves():
    """At the demo model's page: 6 layers, 2 heads of 64, 64 tokens, int4."""
    assert HEADER_BYTES <= 0.01 * 6 * 2 * 64 * 64


def test_pages_are_taken_only_while_the_fetch_lives(peers):
    """A fetch that ended gives its pages back; what still arrives must not be written over their new use."""
    owner, receiver = peers
    receiver.timeout_s = 0.5
    owner.transports[0].read_chunk = lambda index, chunk: time.sleep(0.3)
    started = time.monotonic()
    receiver.exchange._config = type(receiver.exchange._config)(timeout_s=0.5)
    done = fetch(receiver, owner, KEYS)
    assert done.failure in (Cause.DEADLINE, Cause.PEER)
    assert time.monotonic() - started < 5  # far below the time that all chunks would take
    run([receiver], lambda: receiver.pool.used == 0)
    receiver.pool.allocate(receiver.pages)
    receiver.shards[0].pool_NB.fill_(7)
    time.sleep(1.5)
    assert torch.equal(receiver.shards[0].pool_NB, torch.full_like(receiver.shards[0].pool_NB, 7))


def test_forty_faults_in_a_row_cost_forty_transfers():
    """Of random kinds, on either side; after each, the books are right and the next transfer works."""
    peers = owner, receiver = (
        StorePeer(ReplicaId("owner"), patience_s=0.25),
        StorePeer(ReplicaId("receiver"), patience_s=0.25),
    )
    owner.cache(KEYS)
    rng, causes = random.Random(0), Counter[Cause | None]()

    def refuse(index: int, chunk: Tensor) -> None:
        raise TransferFailed(Cause.CLOSED, "as if")

    def rewrite(index: int, chunk: Tensor) -> None:
        owner.pool.expire_leases(time.monotonic() + 100)

    def give_up(index: int, chunk: Tensor) -> None:
        receiver.exchange.peer_gone(owner.name, time.monotonic())

    faults = {
        "byte": ("read_chunk", lambda: flip(rng.randrange(-1000, 0))),
        "header": ("read_chunk", lambda: flip(rng.choice([3, 40, 64, 72, 80]), HEADERS)),
        "sender": ("read_chunk", lambda: refuse),
        "receiver": ("write_chunk", lambda: refuse),
        "lease": ("read_chunk", lambda: rewrite),
        "news": ("write_chunk", lambda: give_up),
    }
    for _ in range(40):
        side, make = faults[rng.choice(list(faults))]
        transport = (owner if side == "read_chunk" else receiver).transports[0]
        setattr(transport, side, make())
        done = fetch(receiver, owner, KEYS)
        causes[done.failure] += 1
        assert receiver.pool.lookup(KEYS) == (0, 0)
        settled(*peers)
        setattr(transport, side, None)
        if rng.random() < 0.3:
            assert fetch(receiver, owner, KEYS).failure is None
            assert receiver.holds(KEYS)
            receiver.pool.release(receiver.pool.allocate(receiver.pages))
    assert causes.keys() == {
        *(Cause.CHECKSUM, Cause.HEADER, Cause.PEER, Cause.CLOSED, Cause.LEASE),
    }
    owner.close()
    receiver.close()
