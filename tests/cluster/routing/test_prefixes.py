"""Blocks that replicas are thought to hold, in bounded memory."""

import math

import pytest

from quire.cluster.routing.prefixes import KnownBlocks, Rents
from quire.kvstore.keys import BlockKey, KeySpace, extend_chain

ROOT = KeySpace(b"l", b"m", b"t").root()


def chain(*blocks: int, root: BlockKey = ROOT):
    return extend_chain(root, [token for block in blocks for token in [block] * 16], 16)


def test_the_longest_known_beginning_is_found():
    known = KnownBlocks(100)
    known.used(chain(1, 2, 3))
    assert known.match(chain(1, 2, 3, 4)) == 3
    assert known.match(chain(1, 2, 9)) == 2
    assert known.match(chain(9, 2, 3)) == 0
    assert known.match([]) == 0


def test_ends_are_forgotten_before_beginnings_and_the_least_used_first():
    known = KnownBlocks(4)
    known.used(chain(1, 2))
    known.used(chain(3, 4))
    known.used(chain(1))
    known.used(chain(5))  # makes room at the end of 1, 2: only its beginning was used again
    assert len(known) == 4
    assert [known.match(c) for c in (chain(1, 2), chain(3, 4), chain(5))] == [1, 2, 1]


def test_it_shrinks_with_its_pool():
    known = KnownBlocks(100)
    known.used(chain(*range(50)))
    known.resize(10)
    assert len(known) == known.match(chain(*range(50))) == 10


def test_tenants_do_not_share():
    known = KnownBlocks(100)
    known.used(chain(1, 2))
    other = KeySpace(b"l", b"m", b"t").root("another tenant")
    assert known.match(chain(1, 2, root=other)) == 0


def test_rent_adds_up_by_prefix_until_it_is_bought():
    rents, (one, other) = Rents(), chain(1, 2)
    assert rents.paid_s(one) == 0
    rents.pay(one, 0.25)
    rents.pay(other, 4.0)
    rents.pay(one, 0.5)
    assert (rents.paid_s(one), rents.paid_s(other)) == (0.75, 4.0)
    rents.bought(one)
    assert (rents.paid_s(one), rents.paid_s(other)) == (0, 4.0)


def test_what_nobody_has_paid_for_lately_is_forgotten():
    rents, prefixes = Rents(), chain(*range(5000))
    for prefix in prefixes:
        rents.pay(prefix, 1.0)
        rents.pay(prefixes[0], 1.0)
    assert rents.paid_s(prefixes[1]) == 0
    assert rents.paid_s(prefixes[0]) == 5001.0


def test_rent_fades_while_what_a_copy_would_be_is_forgotten():
    rents, (one,) = Rents(), chain(1)
    rents.pay(one, 1.0)
    rents.turned(0.5)
    rents.turned(0.5)
    assert rents.paid_s(one) == pytest.approx(math.exp(-1))
    rents.pay(one, 1.0)
    assert rents.paid_s(one) == pytest.approx(1 + math.exp(-1))


def test_it_says_how_much_it_forgot():
    known = KnownBlocks(4)
    assert [known.used(chain(1, 2, 3)), known.used(chain(1)), known.used(chain(4, 5, 6))] == [0, 0, 2]
