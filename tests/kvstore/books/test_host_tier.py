"""Host memory behind the pool: what is evicted there comes back byte for byte, within a bound."""

from __future__ import annotations

import random

import pytest
import torch

from quire.kvstore.books.host_tier import Copies, HostPages, HostTier
from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.books.pool import PagePool
from quire.kvstore.books.prefix_index import PageId

PAGE_BYTES = 256


def keys_of(count: int, seed: int = 0) -> list[BlockKey]:
    return extend_chain(KeySpace(b"l", b"m", b"t").root(str(seed)), list(range(16 * count)), 16)


def bytes_of(key: BlockKey) -> torch.Tensor:
    return torch.frombuffer(bytearray(key * (PAGE_BYTES // 32)), dtype=torch.uint8)


def evicted(keys: list[BlockKey]) -> list[tuple[BlockKey, PageId]]:
    return [(key, PageId(i)) for i, key in enumerate(keys)]


def test_the_pool_says_what_it_evicts_before_it_hands_out_the_page():
    heard: list[list[tuple[BlockKey, PageId]]] = []
    pool, keys = PagePool(3, lambda pairs: heard.append(list(pairs))), keys_of(3)
    pages = pool.allocate(3)
    for key, page in zip(keys, pages, strict=True):
        pool.publish(key, page)
    pool.release(pages)
    assert not heard
    pool.allocate(2)
    assert heard == [[(keys[2], pages[2]), (keys[1], pages[1])]]


def test_the_least_recently_used_block_makes_room():
    tier, keys = HostTier(3), keys_of(4)
    tier.demote(evicted(keys[:3]))
    tier.promote(keys[:1], [PageId(0)])
    tier.demote(evicted(keys[3:]))
    assert [tier.match([key]) for key in keys] == [1, 0, 1, 1]
    assert (tier.used, tier.stats.dropped) == (3, 1)
    tier.check()


def test_a_block_that_is_here_already_is_not_copied_again():
    tier, keys = HostTier(3), keys_of(2)
    tier.demote(evicted(keys))
    assert tier.demote(evicted(keys)) == Copies((), ())
    assert tier.stats.demoted == 2


def test_more_than_fits_keeps_what_was_evicted_last():
    tier, keys = HostTier(2), keys_of(5)
    copies = tier.demote(evicted(keys))
    assert copies.pages == (3, 4)
    assert sorted(copies.slots) == [0, 1]
    assert tier.match(keys[3:]) == 2
    tier.check()


def test_forgotten_blocks_are_not_found_and_their_slots_come_back():
    tier, keys = HostTier(3), keys_of(3)
    tier.demote(evicted(keys))
    tier.forget([*keys[1:], *keys[1:]])
    assert (tier.match(keys), tier.used) == (1, 1)
    tier.check()


def test_without_slots_everything_is_dropped():
    tier = HostTier(0)
    assert tier.demote(evicted(keys_of(2))) == Copies((), ())
    assert tier.match(keys_of(2)) == 0
    tier.check()


def test_a_match_ends_at_the_first_missing_block():
    tier, keys = HostTier(4), keys_of(4)
    tier.demote(evicted([keys[0], keys[1], keys[3]]))
    assert tier.match(keys) == 2


@pytest.mark.parametrize("slots", [3, 20])
def test_blocks_that_come_back_hold_the_bytes_they_left_with(slots):
    """Chains come and go through a pool that is too small; every block that is found is right."""
    rng = random.Random(slots)
    pool_NB = torch.zeros(12, PAGE_BYTES, dtype=torch.uint8)
    tier, host = HostTier(slots), HostPages(pool_NB, slots)
    pool = PagePool(12, lambda pairs: host.demote(tier.demote(pairs)))
    hits = 0
    for _ in range(600):
        keys = keys_of(rng.randint(1, 6), rng.randint(0, 7))
        pages = pool.share(keys)
        rest = keys[len(pages) :]
        fresh = pool.allocate(len(rest))
        here = tier.match(rest)
        host.promote(tier.promote(rest[:here], fresh[:here]))
        hits += here
        for key, page in zip(rest[here:], fresh[here:], strict=True):
            pool_NB[page] = bytes_of(key)  # computed
        for key, page in zip(rest, fresh, strict=True):
            pool.publish(key, page)
        pages += fresh
        for key, page in zip(keys, pages, strict=True):
            assert torch.equal(pool_NB[page], bytes_of(key))
        pool.release(pages)
        tier.check()
        pool.check()
    assert hits > 20
