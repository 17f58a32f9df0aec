"""What a leaver offers, how long it is open, and what an heir still wants. Without engines."""

from __future__ import annotations

from quire.kvstore.keys import BlockKey
from quire.kvstore.messages import Leaving, ReplicaId
from quire.replicas.hand_over import _HOT_CHAINS, HandOver

SPACE = b"\1" * 32
A, B, C = ReplicaId("a"), ReplicaId("b"), ReplicaId("c")


def chain(number: int) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(bytes([number >> 8, number & 255, at]).rjust(16)) for at in range(2))


def leaving(*numbers: int) -> Leaving:
    return Leaving(SPACE, tuple(chain(number) for number in numbers))


def test_each_chain_goes_to_one_heir_the_hottest_first():
    leaver = HandOver(SPACE)
    for number in (1, 2, 3, 1):
        leaver.used(chain(number))
    leaver.used(())
    assert leaver.will((A, B)) == [(A, leaving(1, 2)), (B, leaving(3))]


def test_only_the_chains_used_last_are_remembered():
    leaver = HandOver(SPACE)
    for number in range(_HOT_CHAINS + 5):
        leaver.used(chain(number))
    ((_, will),) = leaver.will((A,))
    assert len(will.chains) == _HOT_CHAINS
    assert will.chains[-1] == chain(5)


def test_a_leaver_is_open_until_all_have_answered():
    leaver = HandOver(SPACE)
    leaver.answered(C)  # said to one that stays: of no account
    assert not leaver.open
    leaver.begin((A, B))
    leaver.answered(A)
    leaver.answered(C)
    assert leaver.open
    leaver.answered(B)
    assert not leaver.open


def test_an_heir_is_satisfied_once_nothing_is_left_to_fetch_and_says_so_once():
    heir, fetching = HandOver(SPACE), {A}
    heir.offered(A, leaving(1))
    heir.offered(B, leaving())
    assert heir.satisfied(fetching.__contains__) == {B}
    assert heir.legacy.popleft() == (A, chain(1))
    assert heir.satisfied(fetching.__contains__) == set()
    fetching.clear()
    assert heir.satisfied(fetching.__contains__) == {A}
    assert heir.satisfied(fetching.__contains__) == set()


def test_chains_of_another_space_and_those_offered_to_a_leaver_are_answered_and_not_wanted():
    heir = HandOver(SPACE)
    heir.offered(A, Leaving(b"\2" * 32, (chain(1),)))
    heir.begin((B,))
    heir.offered(C, leaving(2))
    assert not heir.legacy
    assert heir.satisfied(lambda owner: False) == {A, C}
