"""What was paid for prefixes, in bounded memory."""

import math

import pytest

from quire.cluster.routing.rents import Rents
from quire.kvstore.keys import BlockKey


def prefixes(count):
    return [BlockKey(number.to_bytes(32, "big")) for number in range(count)]


def test_rent_adds_up_by_prefix_until_it_is_bought():
    rents, (one, other) = Rents(), prefixes(2)
    assert rents.paid_s(one) == 0
    rents.pay(one, 0.25)
    rents.pay(other, 4.0)
    rents.pay(one, 0.5)
    assert (rents.paid_s(one), rents.paid_s(other)) == (0.75, 4.0)
    rents.bought(one)
    assert (rents.paid_s(one), rents.paid_s(other)) == (0, 4.0)


def test_what_nobody_has_paid_for_lately_is_forgotten():
    rents, keys = Rents(), prefixes(5000)
    for prefix in keys:
        rents.pay(prefix, 1.0)
        rents.pay(keys[0], 1.0)
    assert rents.paid_s(keys[1]) == 0
    assert rents.paid_s(keys[0]) == 5001.0


def test_rent_fades_while_what_a_copy_would_be_is_forgotten():
    rents, (one,) = Rents(), prefixes(1)
    rents.pay(one, 1.0)
    rents.turned(0.5)
    rents.turned(0.5)
    assert rents.paid_s(one) == pytest.approx(math.exp(-1))
    rents.pay(one, 1.0)
    assert rents.paid_s(one) == pytest.approx(1 + math.exp(-1))
