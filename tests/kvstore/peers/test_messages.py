"""Messages survive their bytes, and nothing else is taken for one."""

from __future__ import annotations

import msgspec
import pytest

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.peers.messages import (
    Accept,
    Done,
    DrainAck,
    DrainOffer,
    Moved,
    Offer,
    ReceivePages,
    Refuse,
    Released,
    SendPages,
    decode_message,
    encode_message,
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
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_message_is_the_same_after_its_bytes(message):
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize(
    "inner",
    [
        SendPages(ReplicaId("r"), T, KEYS, PAGES, (4, 5), ENDS, 1.0),
        ReceivePages(T, KEYS, PAGES, (4, 5), ENDS, 1.0),
        Moved(T, 1, True, 0.5, 100),
        Moved(T, 1, False, 0.5, 0, Cause.PEER, "gone"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_orders_and_reports_are_the_same_after_their_bytes_and_no_messages_between_replicas(inner):
    data = msgspec.msgpack.encode(inner)
    assert msgspec.msgpack.decode(data, type=SendPages | ReceivePages | Moved) == inner
    with pytest.raises(ValueError, match="not a message"):
        decode_message(data)


ACCEPT = {"type": "Accept", "transfer": 7, "generations": [1], "endpoints": [], "lease_s": 1.0}
OFFER = {"type": "Offer", "transfer": 7, "keys": [KEYS[0]], "space": b"", "endpoints": [], "timeout_s": 1.0}
END = {"name": "a", "host": "10.0.0.1", "port": 80}


@pytest.mark.parametrize("whole", [ACCEPT, OFFER, {**ACCEPT, "endpoints": [END]}], ids=str)
def test_what_the_next_test_damages_is_a_message_before(whole):
    decode_message(msgspec.msgpack.encode(whole))


@pytest.mark.parametrize(
    "values",
    [
        [],
        {},
        {"type": "Popen", "args": "ls"},
        {"type": "Done"},
        {"type": "Done", "transfer": "7"},
        {"type": "Done", "transfer": True},
        {"type": "Done", "transfer": 7, "more": 1},
        {"type": "Done", "transfer": -7},
        {"type": "Released", "transfer": 7, "held": 1},
        {"type": "Refuse", "transfer": 7, "cause": "moon", "reason": ""},
        {**ACCEPT, "generations": [2**63]},
        {**ACCEPT, "generations": [-1]},
        {**ACCEPT, "lease_s": 1e300},
        {**ACCEPT, "lease_s": float("nan")},
        {**ACCEPT, "lease_s": float("inf")},
        {**ACCEPT, "lease_s": -1.0},
        {**ACCEPT, "endpoints": [{**END, "port": 65536}]},
        {**ACCEPT, "endpoints": [{**END, "port": -1}]},
        {**ACCEPT, "endpoints": [{**END, "more": 1}]},
        {**OFFER, "keys": [b"short"]},
        {**OFFER, "keys": ["0" * 32]},
        {**OFFER, "space": b"0" * 65},
    ],
    ids=str,
)
def test_values_that_are_no_message_are_refused(values):
    with pytest.raises(ValueError, match="not a message"):
        decode_message(msgspec.msgpack.encode(values))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\x91" * 100_000,
        b"\x82\xa1x" + b"\x91" * 100_000,  # as deep, before the tag
        encode_message(Done(T))[:-1],
        encode_message(Done(T)) + b"\0",
    ],
    ids=["nothing", "a number", "deep", "deep inside", "cut off", "longer"],
)
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(ValueError, match="not a message"):
        decode_message(data)
