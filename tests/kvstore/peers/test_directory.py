"""The directory: hints about chains, incarnations, bounds."""

from __future__ import annotations

import random

import pytest

from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.peers.directory import Announcement, Directory, Holder, hints_of
from quire.kvstore.peers.ids import ReplicaId

A, B, C = ReplicaId("a"), ReplicaId("b"), ReplicaId("c")


def chain(blocks: int, seed: int = 0) -> list[BlockKey]:
    return extend_chain(KeySpace(b"l", b"m", b"t").root(str(seed)), list(range(16 * blocks)), 16)


def say(
    directory: Directory,
    owner: ReplicaId,
    number: int,
    added: list[BlockKey] = [],  # noqa: B006
    removed: list[BlockKey] = [],  # noqa: B006
    now_s: float = 0.0,
) -> bool:
    return directory.announce(Announcement(owner, number, hints_of(added), hints_of(removed)), now_s)


@pytest.fixture
def directory() -> Directory:
    return Directory(max_entries=10_000, silence_s=30)


def test_a_whole_chain_is_one_lookup_and_the_longest_reach_comes_first(directory):
    keys = chain(10)
    say(directory, A, 0, keys[:4])
    say(directory, B, 0, keys[:9])
    say(directory, C, 0, keys[1:])  # without the first block the rest is of no use
    assert directory.lookup(keys) == (Holder(B, 9), Holder(A, 4))
    assert directory.lookup(keys[:3]) == (Holder(A, 3), Holder(B, 3))
    assert directory.lookup(chain(3, seed=1)) == ()
    assert directory.lookup([]) == ()


def test_withdrawn_blocks_are_not_found(directory):
    keys = chain(5)
    say(directory, A, 0, keys)
    say(directory, A, 1, removed=keys[2:])
    assert directory.lookup(keys) == (Holder(A, 2),)
    say(directory, A, 2, removed=keys[:2])
    assert directory.stats().entries == 0


def test_entries_die_with_their_owner_and_are_swept(directory):
    keys = chain(300)
    say(directory, A, 0, keys)
    say(directory, B, 0, keys[:2])
    directory.gone(A)
    assert directory.lookup(keys) == (Holder(B, 2),)
    for number in range(1, 257):
        say(directory, B, number)
    assert directory.stats().entries == 2


def test_an_owner_that_starts_anew_has_only_what_it_says_then(directory):
    keys = chain(5)
    say(directory, A, 0, keys)
    say(directory, A, 0, keys[:1])
    assert directory.lookup(keys) == (Holder(A, 1),)


def test_a_gap_or_an_unknown_owner_must_start_anew(directory):
    keys = chain(5)
    assert not say(directory, A, 1, keys)
    assert directory.lookup(keys) == ()
    assert say(directory, A, 0, keys)
    assert not say(directory, A, 2)
    assert say(directory, A, 1)


def test_silence_is_death(directory):
    keys = chain(2)
    say(directory, A, 0, keys, now_s=0)
    say(directory, B, 0, keys, now_s=20)
    say(directory, B, 1, now_s=31)
    assert directory.lookup(keys) == (Holder(B, 2),)
    assert not say(directory, A, 1, now_s=32)


def test_memory_stays_within_its_bound_and_the_oldest_entries_go():
    directory = Directory(max_entries=2560)
    old, new = chain(2000, seed=1), chain(2000, seed=2)
    say(directory, A, 0, old)
    say(directory, A, 1, new)
    stats = directory.stats()
    assert stats.entries <= 2560
    assert stats.evicted == 4000 - stats.entries
    kept_old = sum(bool(directory.lookup([key])) for key in old)
    kept_new = sum(bool(directory.lookup([key])) for key in new)
    assert kept_new > 1800 > 800 > kept_old


def test_an_entry_names_a_few_owners_and_makes_room_for_the_living(directory):
    keys, owners = chain(1), [ReplicaId(str(i)) for i in range(9)]
    for owner in owners:
        say(directory, owner, 0, keys)
    assert len(directory.lookup(keys)) == 4
    for owner in owners:
        directory.gone(owner)
    say(directory, A, 0, keys)
    assert directory.lookup(keys) == (Holder(A, 1),)


def test_too_small_a_bound_is_refused():
    with pytest.raises(ValueError, match="at least 256 entries"):
        Directory(10)


def test_replicas_that_come_and_go_leave_no_stale_owner():
    """Against a model of the truth: whoever is named lives, and said that it holds these blocks."""
    rng, directory = random.Random(0), Directory(max_entries=50_000)
    chains = [chain(12, seed) for seed in range(40)]
    truth: dict[ReplicaId, set[BlockKey]] = {}
    numbers: dict[ReplicaId, int] = {}
    born = 0
    for turn in range(4000):
        what = rng.random()
        if what < 0.02 or not truth:
            owner, born = ReplicaId(f"r{born}"), born + 1
            truth[owner], numbers[owner] = set(), 0
            say(directory, owner, 0, now_s=turn * 0.001)
        elif what < 0.035 and len(truth) > 2:
            owner = rng.choice(list(truth))
            directory.gone(owner)
            del truth[owner]
        elif what < 0.7:
            owner, keys = rng.choice(list(truth)), rng.choice(chains)
            added = keys[: rng.randint(1, 12)]
            removed = [key for key in truth[owner] if rng.random() < 0.2 and key not in added]
            numbers[owner] += 1
            say(directory, owner, numbers[owner], added, removed, now_s=turn * 0.001)
            truth[owner] = (truth[owner] | set(added)) - set(removed)
        else:
            keys = rng.choice(chains)
            for holder in directory.lookup(keys):
                assert holder.owner in truth
                assert set(keys[: holder.blocks]) <= truth[holder.owner]
