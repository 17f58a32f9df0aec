"""The messages between replicas about blocks, and the orders and reports between a replica and its shards.

The conversation, receiver on the left:

    Offer     →            I would take these blocks
              ←  Accept    the leading ones are pinned for you (or Refuse)
              ←  pages     from shard to shard, over links
    Done      →            all arrived, or I gave up: unpin
              ←  Released  whether they stayed pinned all the time: only then are they what their keys say

And once, from a replica that is scaled in, to those that stay: DrainOffer, answered by DrainAck.

All are MessagePack maps, tagged with their type. Decoding checks every type and bound.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from quire.kvstore.books.keys import KEY_BYTES, BlockKey
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.wire.failures import Cause
from quire.kvstore.wire.transport import Endpoint

_COUNT = Meta(ge=0, le=2**63 - 1)
Key = Annotated[BlockKey, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Space = Annotated[bytes, Meta(max_length=64)]
"""`KeySpace.fingerprint`: blocks of equal key spaces can be exchanged."""
Transfer = Annotated[TransferId, _COUNT]
Page = Annotated[PageId, _COUNT]
Count = Annotated[int, _COUNT]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]


class Value(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Something that travels; its class is its tag."""


class Offer(Value, frozen=True):
    """The sender would take these blocks."""

    transfer: Transfer
    keys: tuple[Key, ...]
    """Successive blocks of one chain."""
    space: Space
    """The receiver's key space."""
    endpoints: tuple[Endpoint, ...]
    """The addresses of the receiver's shards, by rank."""
    timeout_s: Seconds
    """The receiver will have given up by then."""


class Accept(Value, frozen=True):
    """The leading blocks of an offer are pinned, and their pages are on their way."""

    transfer: Transfer
    generations: tuple[Count, ...]
    """The generations of the pages that hold the leading blocks: one per block that will be sent."""
    endpoints: tuple[Endpoint, ...]
    """The addresses of the owner's shards, by rank."""
    lease_s: Seconds
    """How long the pages stay pinned."""


class Refuse(Value, frozen=True):
    """An offer comes to nothing."""

    transfer: Transfer
    cause: Cause
    reason: str


class Done(Value, frozen=True):
    """All blocks have arrived, or the receiver has given up: the owner unpins its pages."""

    transfer: Transfer


class Released(Value, frozen=True):
    """The answer to `Done`."""

    transfer: Transfer
    held: bool
    """The pages were pinned, and sound, until now."""


class DrainOffer(Value, frozen=True):
    """The sender is about to go. These chains of blocks are worth fetching, the hottest first."""

    space: Space
    """The sender's key space."""
    chains: tuple[tuple[Key, ...], ...]


class DrainAck(Value, frozen=True):
    """The sender has what it wants of an offer: the replica that goes need not wait for it."""


Message = Offer | Accept | Refuse | Done | Released | DrainOffer | DrainAck
"""Between replicas."""


class SendPages(Value, frozen=True):
    """An order to every shard of the owner; each finds its own part."""

    receiver: ReplicaId
    transfer: Transfer
    keys: tuple[Key, ...]
    pages: tuple[Page, ...]
    generations: tuple[Count, ...]
    peers: tuple[Endpoint, ...]
    """The receiver's shards, by rank."""
    timeout_s: Seconds


class ReceivePages(Value, frozen=True):
    """An order to every shard of the receiver."""

    transfer: Transfer
    keys: tuple[Key, ...]
    pages: tuple[Page, ...]
    generations: tuple[Count, ...]
    """The owner's generations."""
    peers: tuple[Endpoint, ...]
    """The owner's shards, by rank."""
    timeout_s: Seconds


Order = SendPages | ReceivePages
"""From a replica to its shards."""


class CompletePages(Value, frozen=True):
    """Tells every shard that these pages hold complete blocks now, which peers may come to ask for."""

    pages: tuple[Page, ...]
    generations: tuple[Count, ...]


class Moved(Value, frozen=True):
    """A shard's report: its part of an order is over, and it touches those pages no more."""

    transfer: Transfer
    rank: Count
    received: bool
    """Whether the order was a `ReceivePages`."""
    seconds: Seconds
    bytes_moved: Count
    """Page bytes, headers not counted; 0 after a failure."""
    failure: Cause | None = None
    reason: str = ""


_MESSAGES = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """Encode a message between replicas as MessagePack."""
    return msgspec.msgpack.encode(message)


def decode_message(data: bytes) -> Message:
    """Decode what `encode_message` wrote. Raises ValueError for anything else."""
    try:
        message: Message = _MESSAGES.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not a message of the store ({error}): {data[:80]!r}") from error
    return message
