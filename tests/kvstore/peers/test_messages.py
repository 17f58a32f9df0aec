"""Messages survive their bytes, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.messages import (
    CHECKSUM_WORD,
    HEADER_BYTES,
    Accept,
    Done,
    DrainAck,
    DrainOffer,
    Moved,
    Offer,
    ReceivePages,
    Refuse,
    Released,
    ReplicaId,
    SendPages,
    TransferId,
    from_bytes,
    header_part,
    page_headers,
    to_bytes,
)
from quire.kvstore.wire.failures import Cause
from quire.kvstore.wire.transport import Endpoint

T, KEYS = TransferId(7), (BlockKey(bytes(range(32))), BlockKey(b"\0" * 32))
ENDS = (Endpoint("a", "10.0.0.1", 80), Endpoint("b", "10.0.0.2", 81))
PAGES = (PageId(3), PageId(0))


@pytest.mark.parametrize(
    "message",
    [
        Offer(T, KEYS, b"\1" * 32, ENDS, 2.5),
        Accept(T, (4, 5), ENDS, 2),
        Refuse(T, Cause.BUSY, "come back"),
        Done(T),
        Released(T, True),
        DrainOffer(b"\1" * 32, (KEYS, KEYS[1:])),
        DrainAck(),
        SendPages(ReplicaId("r"), T, KEYS, PAGES, (4, 5), ENDS, 1.0),
        ReceivePages(T, KEYS, PAGES, (4, 5), ENDS, 1.0),
        Moved(T, 1, True, 0.5, 100),
        Moved(T, 1, False, 0.5, 0, Cause.PEER, "gone"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_message_is_the_same_after_its_bytes(message):
    assert from_bytes(to_bytes(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"kind": "Popen", "args": "ls"}',
        b'{"kind": "Done"}',
        b'{"kind": "Done", "transfer": "7"}',
        b'{"kind": "Done", "transfer": 7, "more": 1}',
        b'{"kind": "Released", "transfer": 7, "held": 1}',
        b'{"kind": "Refuse", "transfer": 7, "cause": "moon", "reason": ""}',
        b'{"kind": "Done", "transfer": -7}',
        b'{"kind": "Accept", "transfer": 7, "generations": [%d], "endpoints": [], "lease_s": 1}' % 2**64,
        b'{"kind": "Accept", "transfer": 7, "generations": [1], "endpoints": [], "lease_s": %d}' % 10**400,
        b'{"kind": "Accept", "transfer": 7, "generations": [1], "endpoints": [], "lease_s": NaN}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        from_bytes(data)


def test_headers_are_small_and_every_word_of_them_has_a_name():
    headers = page_headers(KEYS, b"\2" * 32, (2, 4), (8, 9))
    assert headers.nbytes == 2 * HEADER_BYTES == 192
    assert headers[0, :4].tobytes() == KEYS[0]
    assert headers[:, CHECKSUM_WORD].tolist() == [0, 0]
    for word, part in ((0, "key"), (3, "key"), (4, "layout"), (9, "generation"), (10, "checksum")):
        assert header_part(word) == part


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"keys": KEYS[::-1]}, "key"),
        ({"layout": b"\3" * 32}, "layout"),
        ({"heads": (3, 4)}, "head range or version"),
        ({"heads": (2, 5)}, "head range or version"),
        ({"generations": (8, 10)}, "generation"),
    ],
)
def test_headers_differ_where_what_they_say_differs(other, part):
    said = {"keys": KEYS, "layout": b"\2" * 32, "heads": (2, 4), "generations": (8, 9)}
    different = page_headers(**said) != page_headers(**{**said, **other})
    assert {header_part(word) for word in different.nonzero()[1]} == {part}
