"""Messages survive their bytes, and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from quire.kvstore.failures import Cause
from quire.kvstore.keys import BlockKey
from quire.kvstore.messages import (
    HEADER_BYTES,
    Accept,
    Done,
    Moved,
    Offer,
    ReceivePages,
    Refuse,
    Released,
    ReplicaId,
    SendPages,
    TransferId,
    from_bytes,
    headers_from,
    page_headers,
    to_bytes,
)
from quire.kvstore.prefix_index import PageId
from quire.kvstore.transport import Endpoint

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
    ],
)
def test_anything_else_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        from_bytes(data)


def test_headers_survive_their_bytes_and_are_small():
    headers = page_headers(KEYS, b"\2" * 32, (2, 4), (8, 9), np.array([-1, 2**62]))
    data = headers.view("u1")
    assert len(data) == 2 * HEADER_BYTES == 192
    assert (headers_from(data) == headers).all()
    assert headers["key"][0].tobytes() == KEYS[0]
    assert headers["checksum"].tolist() == [-1, 2**62]
