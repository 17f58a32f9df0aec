"""What replicas say to each other about blocks, and what a replica tells its shards. Values, and their bytes.

The conversation, receiver on the left:

    Offer     →            I would take these blocks
              ←  Accept    the leading ones are pinned for you (or Refuse)
              ←  pages     from shard to shard, over links
    Done      →            all arrived, or I gave up: unpin
              ←  Released  whether they stayed pinned all the time: only then are they what their keys say

And once, from a replica that is scaled in, to those that stay: DrainOffer, answered by DrainAck.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache, partial
from types import UnionType
from typing import Any, NewType, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from quire.kvstore.books.keys import KEY_BYTES, BlockKey
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.wire.failures import Cause
from quire.kvstore.wire.transport import Endpoint

TransferId = NewType("TransferId", int)
"""Chosen by the receiver, never used twice by it. Also the ticket of the transfer's streams."""

ReplicaId = NewType("ReplicaId", str)
"""One incarnation of a replica: a restarted one has another."""


@dataclass(frozen=True, slots=True)
class Offer:
    transfer: TransferId
    keys: tuple[BlockKey, ...]
    """Successive blocks of one chain."""
    space: bytes
    """`KeySpace.fingerprint` of the receiver."""
    endpoints: tuple[Endpoint, ...]
    """Of the receiver's shards, by rank."""
    timeout_s: float
    """The receiver will have given up by then."""


@dataclass(frozen=True, slots=True)
class Accept:
    transfer: TransferId
    generations: tuple[int, ...]
    """Of the pages that hold the leading blocks; so many blocks come."""
    endpoints: tuple[Endpoint, ...]
    """Of the owner's shards, by rank."""
    lease_s: float
    """The pages are pinned for so long."""


@dataclass(frozen=True, slots=True)
class Refuse:
    transfer: TransferId
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    transfer: TransferId


@dataclass(frozen=True, slots=True)
class Released:
    transfer: TransferId
    held: bool
    """The pages were pinned, and sound, until now."""


@dataclass(frozen=True, slots=True)
class DrainOffer:
    """The sender is about to go. These chains of blocks are worth fetching, the hottest first."""

    space: bytes
    """`KeySpace.fingerprint`: of use to those with the same."""
    chains: tuple[tuple[BlockKey, ...], ...]


@dataclass(frozen=True, slots=True)
class DrainAck:
    """The sender has what it wants of an offer: the replica that goes need not wait for it."""


Message = Offer | Accept | Refuse | Done | Released | DrainOffer | DrainAck
"""Between replicas."""


@dataclass(frozen=True, slots=True)
class SendPages:
    """For every shard of the owner; each finds its own part."""

    receiver: ReplicaId
    transfer: TransferId
    keys: tuple[BlockKey, ...]
    pages: tuple[PageId, ...]
    generations: tuple[int, ...]
    peers: tuple[Endpoint, ...]
    """The receiver's shards, by rank."""
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ReceivePages:
    """For every shard of the receiver."""

    transfer: TransferId
    keys: tuple[BlockKey, ...]
    pages: tuple[PageId, ...]
    generations: tuple[int, ...]
    """The owner's."""
    peers: tuple[Endpoint, ...]
    """The owner's shards, by rank."""
    timeout_s: float


Order = SendPages | ReceivePages
"""From a replica to its shards."""


@dataclass(frozen=True, slots=True)
class CompletePages:
    """For every shard: these pages hold complete blocks now, which peers may come to ask for."""

    pages: tuple[PageId, ...]
    generations: tuple[int, ...]

    def to_bytes(self) -> bytes:
        """All pages, then all generations, as little-endian int64."""
        return np.array([self.pages, self.generations], dtype="<i8").tobytes()

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> CompletePages:
        """The inverse of `to_bytes`."""
        pages, generations = np.frombuffer(data, dtype="<i8").reshape(2, -1).tolist()
        return CompletePages(tuple(pages), tuple(generations))


@dataclass(frozen=True, slots=True)
class Moved:
    """A shard's report: its part of an order is over, and it touches those pages no more."""

    transfer: TransferId
    rank: int
    received: bool
    """Whether it was a `ReceivePages`."""
    seconds: float
    bytes_moved: int
    """Page bytes: headers not counted; 0 after a failure."""
    failure: Cause | None = None
    reason: str = ""


# ---- page headers ---------------------------------------------------------------------------------------

PageHeaders = npt.NDArray[np.int64]
"""[pages, words]: the words of one header per page, see `_HEADER`."""

_HEADER = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("layout", "V32"),
        ("first_head", "<u2"),
        ("heads", "<u2"),
        ("version", "<u4"),
        ("generation", "<u8"),
        ("checksum", "<i8"),
        ("unused", "<u8"),
    ]
)
HEADER_BYTES = _HEADER.itemsize
_WORD = 8
CHECKSUM_WORD = _HEADER.fields["checksum"][1] // _WORD  # type: ignore[index]
_VERSION = 3


def page_headers(
    keys: tuple[BlockKey, ...], layout: bytes, heads: tuple[int, int], generations: tuple[int, ...]
) -> PageHeaders:
    """What travels behind these pages, with the checksums still 0. `heads`: the first, and how many."""
    headers = np.zeros(len(keys), dtype=_HEADER)
    headers["key"] = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
    headers["layout"] = np.void(layout)
    headers["first_head"], headers["heads"] = heads
    headers["version"] = _VERSION
    headers["generation"] = generations
    return headers.view(np.int64).reshape(len(keys), HEADER_BYTES // _WORD)


def header_part(word: int) -> str:
    """What a word of a header is, or belongs to."""
    assert _HEADER.names is not None
    assert _HEADER.fields is not None
    starts = {name: _HEADER.fields[name][1] // _WORD for name in _HEADER.names}
    if word == starts["first_head"]:
        return "head range or version"
    return [name for name, start in starts.items() if start <= word][-1]


# ---- bytes ----------------------------------------------------------------------------------------------

_MOST = 1 << 63
_KINDS = {kind.__name__: kind for kind in (*get_args(Message), *get_args(Order), Moved)}


def to_bytes(value: Message | Order | Moved) -> bytes:
    """JSON, bytes as hex."""
    return json.dumps({"kind": type(value).__name__, **asdict(value)}, default=bytes.hex).encode()


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given. Raises ValueError for anything else."""
    try:
        fields_of = json.loads(data)
        return _reader(_KINDS[fields_of.pop("kind")])(fields_of)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message of the store: {data[:80]!r}") from error


@cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    """What makes a value of this type of its JSON, worked out once: that takes longer than most messages.

    It raises what `from_bytes` expects.
    """
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    if get_origin(hint) is tuple:
        item = _reader(get_args(hint)[0])
        return lambda raw: tuple(map(item, raw))
    if get_origin(hint) in (Union, UnionType):
        some = _reader(get_args(hint)[0])
        return lambda raw: None if raw is None else some(raw)
    if is_dataclass(hint):
        return partial(
            _read_fields, hint, {name: _reader(kind) for name, kind in get_type_hints(hint).items()}
        )
    if hint is bytes:
        return bytes.fromhex
    if hint is Cause:
        return Cause
    return partial(_read_plain, hint)


def _read_fields(kind: Any, readers: Mapping[str, Callable[[Any], Any]], raw: dict[str, Any]) -> Any:
    values = {name: read(raw.pop(name)) for name, read in readers.items()}
    if raw:
        raise TypeError(f"{kind.__name__} has no {', '.join(raw)}")
    return kind(**values)


def _read_plain(hint: Any, raw: Any) -> Any:
    if not isinstance(raw, (int, float) if hint is float else hint):
        raise TypeError(f"{raw!r} is not {hint.__name__}")
    if hint in (int, float) and not 0 <= raw < _MOST:  # all of them count something; no NaN is either
        raise TypeError(f"{raw!r} is no number of a message")
    return raw
