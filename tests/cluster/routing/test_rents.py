"""What was paid for prefixes, in bounded memory."""

import math

import pytest

from quire.cluster.routing.rents import Rents
from quire.kvstore.keys import KeySpace, extend_chain


def chain(*blocks: int):
    root = KeySpace(b"l", b"m", b"t").root()
    return extend_chain(root, [token for block in blocks for token in [block] * 16], 16)


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
