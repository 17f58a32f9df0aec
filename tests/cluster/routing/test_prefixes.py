"""Blocks that replicas are thought to hold, in bounded memory."""

from quire.cluster.routing.prefixes import KnownBlocks
from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain

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
