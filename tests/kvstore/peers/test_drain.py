"""What a replica that goes offers, how long it waits, and what a receiver still wants. Without engines."""

from __future__ import annotations

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.drain import _HOT_CHAINS, Drain
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import DrainOffer

SPACE = b"\1" * 32
A, B, C = ReplicaId("a"), ReplicaId("b"), ReplicaId("c")


def chain(number: int) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(bytes([number >> 8, number & 255, at]).rjust(16)) for at in range(2))


def offer_of(*numbers: int) -> DrainOffer:
    return DrainOffer(SPACE, tuple(chain(number) for number in numbers))


def test_each_chain_goes_to_one_receiver_the_hottest_first():
    owner = Drain(SPACE)
    for number in (1, 2, 3, 1):
        owner.used(chain(number))
    owner.used(())
    assert owner.offers((A, B)) == [(A, offer_of(1, 2)), (B, offer_of(3))]


def test_only_the_chains_used_last_are_remembered():
    owner = Drain(SPACE)
    for number in range(_HOT_CHAINS + 5):
        owner.used(chain(number))
    ((_, offer),) = owner.offers((A,))
    assert len(offer.chains) == _HOT_CHAINS
    assert offer.chains[-1] == chain(5)


def test_a_drain_is_open_until_all_have_answered():
    owner = Drain(SPACE)
    owner.answered(C)  # said to one that stays: of no account
    assert not owner.open
    owner.begin((A, B))
    owner.answered(A)
    owner.answered(C)
    assert owner.open
    owner.answered(B)
    assert not owner.open


def test_a_receiver_is_satisfied_once_nothing_is_left_to_fetch_and_says_so_once():
    receiver, fetching = Drain(SPACE), {A}
    receiver.offered(A, offer_of(1))
    receiver.offered(B, offer_of())
    assert receiver.satisfied(fetching.__contains__) == {B}
    assert receiver.pending_chains.popleft() == (A, chain(1))
    assert receiver.satisfied(fetching.__contains__) == set()
    fetching.clear()
    assert receiver.satisfied(fetching.__contains__) == {A}
    assert receiver.satisfied(fetching.__contains__) == set()


def test_chains_of_another_space_and_those_offered_to_one_that_goes_are_answered_and_not_wanted():
    receiver = Drain(SPACE)
    receiver.offered(A, DrainOffer(b"\2" * 32, (chain(1),)))
    receiver.begin((B,))
    receiver.offered(C, offer_of(2))
    assert not receiver.pending_chains
    assert receiver.satisfied(lambda owner: False) == {A, C}
