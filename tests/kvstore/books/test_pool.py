import random

import pytest

from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.books.pool import IntegrityError, PagePool, PoolFull


def _keys(count: int, seed: int = 0) -> list[BlockKey]:
    return extend_chain(KeySpace(b"l", b"m", b"t").root(str(seed)), list(range(16 * count)), 16)


def test_pages_are_handed_out_once_and_come_back():
    pool = PagePool(5)
    pages = pool.allocate(5)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    with pytest.raises(PoolFull, match="1 KV pages are needed, 0 of 5"):
        pool.allocate(1)
    pool.release(pages)
    assert (pool.free, pool.used, pool.cached) == (5, 0, 0)


def test_a_failed_allocation_changes_nothing():
    pool = PagePool(3)
    held = pool.allocate(2)
    with pytest.raises(PoolFull):
        pool.allocate(2)
    pool.check(held)


def test_published_blocks_outlive_their_sequence_and_are_shared():
    pool, keys = PagePool(4), _keys(3)
    pages = pool.allocate(3)
    for key, page in zip(keys, pages, strict=True):
        pool.publish(key, page)
    pool.release(pages)
    assert (pool.cached, pool.available) == (3, 4)
    assert pool.lookup(keys) == (3, 3)
    first, second = pool.share(keys), pool.share(keys[:2])
    assert first == pages
    assert second == pages[:2]
    assert (pool.cached, pool.used) == (0, 3)
    pool.release(first)
    pool.check(second)


def test_a_match_ends_at_the_first_missing_block():
    pool, keys = PagePool(4), _keys(4)
    pages = pool.allocate(2)
    pool.publish(keys[0], pages[0])
    pool.publish(keys[2], pages[1])
    assert pool.lookup(keys) == (1, 0)
    assert pool.share(keys) == [pages[0]]


def test_eviction_takes_the_least_recently_used_and_a_chains_tail_first():
    pool, old, new = PagePool(4), _keys(2, 1), _keys(2, 2)
    for keys in (old, new):
        pages = pool.allocate(2)
        for key, page in zip(keys, pages, strict=True):
            pool.publish(key, page)
        pool.release(pages)
    pool.release(pool.share(old))  # `old` was used last
    pool.allocate(1)
    assert pool.lookup(new) == (1, 1)
    pool.allocate(1)
    assert pool.lookup(new) == (0, 0)
    assert pool.lookup(old) == (2, 2)


def test_shared_blocks_are_never_evicted():
    pool, keys = PagePool(3), _keys(2)
    pages = pool.allocate(2)
    for key, page in zip(keys, pages, strict=True):
        pool.publish(key, page)
    with pytest.raises(PoolFull):
        pool.allocate(2)
    assert pool.lookup(keys) == (2, 0)


def test_a_block_computed_twice_keeps_its_first_page():
    pool, (key,) = PagePool(3), _keys(1)
    a, b = pool.allocate(2)
    pool.publish(key, a)
    pool.publish(key, b)
    pool.release([a, b])
    assert (pool.cached, pool.free) == (1, 2)
    assert pool.share([key]) == [a]


def test_withdrawn_blocks_are_not_found_and_their_pages_come_back():
    pool, keys = PagePool(3), _keys(2)
    pages = pool.allocate(2)
    for key, page in zip(keys, pages, strict=True):
        pool.publish(key, page)
    sharer = pool.share(keys[:1])
    pool.withdraw(pages)
    assert pool.lookup(keys) == (0, 0)
    pool.release(pages)
    pool.check(sharer)
    pool.release(sharer)
    pool.check()
    assert pool.free == 3


def test_releasing_too_often_is_refused():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release(pages)


def test_the_check_explains_what_is_wrong():
    pool = PagePool(3)
    held = pool.allocate(2)
    pool.check(held)
    with pytest.raises(IntegrityError, match=f"page {held[1]} has 1 references, 0 are held"):
        pool.check(held[:1])


def test_random_use_keeps_the_books_right():
    rng = random.Random(0)
    pool, sequences = PagePool(40), []
    for turn in range(3000):
        if sequences and (rng.random() < 0.45 or pool.available < 5):
            pool.release(sequences.pop(rng.randrange(len(sequences))))
        else:
            keys = _keys(rng.randint(1, 5), rng.randint(0, 9))
            pages = pool.share(keys)
            pages += pool.allocate(len(keys) - len(pages))
            for key, page in zip(keys, pages, strict=True):
                if rng.random() < 0.8:
                    pool.publish(key, page)
            sequences.append(pages)
        if turn % 100 == 0:
            pool.check([page for pages in sequences for page in pages])
    for pages in sequences:
        pool.release(pages)
    pool.check()
    assert pool.used == 0


def _cached(pool: PagePool, keys: list[BlockKey]) -> list[int]:
    pages = pool.allocate(len(keys))
    for key, page in zip(keys, pages, strict=True):
        pool.publish(key, page)
    pool.release(pages)
    return pages


def test_leased_pages_keep_their_blocks_until_the_lease_ends():
    pool, keys = PagePool(4), _keys(3)
    pages = _cached(pool, keys)
    lease = pool.lease(keys, until_s=5)
    assert (list(lease.pages), pool.used, pool.available) == (pages, 3, 1)
    with pytest.raises(PoolFull):
        pool.allocate(2)
    pool.check()
    assert pool.end_lease(lease.id)
    pool.check()
    assert pool.cached == 3
    assert not pool.end_lease(lease.id)


def test_a_lease_covers_the_leading_blocks_that_are_here():
    pool, keys = PagePool(4), _keys(3)
    pages = _cached(pool, keys[:2])
    assert list(pool.lease(keys, 5).pages) == pages
    nothing = pool.lease(_keys(2, seed=1), 5)
    assert nothing.pages == ()
    assert pool.end_lease(nothing.id)


def test_leases_expire_and_what_was_read_under_them_is_not_to_be_trusted():
    pool, keys = PagePool(4), _keys(3)
    _cached(pool, keys)
    early, late = pool.lease(keys[:1], 5), pool.lease(keys, 6)
    assert pool.expire_leases(5.0) == []
    assert pool.expire_leases(5.1) == [early.id]
    assert not pool.end_lease(early.id)
    assert pool.end_lease(late.id)
    pool.check()
    assert pool.cached == 3


def test_a_page_that_is_handed_out_again_has_another_generation():
    pool, keys = PagePool(2), _keys(2)
    _cached(pool, keys)
    before = pool.lease(keys, 5)
    pool.end_lease(before.id)
    held = pool.allocate(2)  # evicts both
    assert all(pool.generation(p) > g for p, g in zip(before.pages, before.generations, strict=True))
    pool.check(held)


def test_a_block_withdrawn_under_a_lease_is_not_to_be_trusted():
    pool, keys = PagePool(3), _keys(2)
    pages = pool.allocate(2)
    for key, page in zip(keys, pages, strict=True):
        pool.publish(key, page)
    lease = pool.lease(keys, 5)
    pool.withdraw(pages)
    pool.release(pages)
    assert pool.used == 2
    assert not pool.end_lease(lease.id)
    pool.check()
    assert pool.free == 3


def test_random_leases_keep_the_books_right():
    rng = random.Random(1)
    pool, sequences, leases = PagePool(30), [], []
    for turn in range(2000):
        keys = _keys(rng.randint(1, 5), rng.randint(0, 9))
        what = rng.random()
        if what < 0.3:
            leases.append(pool.lease(keys, turn + rng.randint(0, 30)).id)
        elif what < 0.5 and leases:
            pool.end_lease(leases.pop(rng.randrange(len(leases))))
        elif sequences and (what < 0.75 or pool.available < 5):
            pool.release(sequences.pop(rng.randrange(len(sequences))))
        elif pool.available >= 5:
            pages = pool.share(keys)
            pages += pool.allocate(len(keys) - len(pages))
            for key, page in zip(keys, pages, strict=True):
                pool.publish(key, page)
            sequences.append(pages)
        pool.expire_leases(turn)
        if turn % 100 == 0:
            pool.check([page for pages in sequences for page in pages])
    pool.expire_leases(10_000)
    for pages in sequences:
        pool.release(pages)
    pool.check()
    assert pool.used == 0
