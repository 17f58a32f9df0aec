"""Moves chunks of bytes between two shards. The seam between what a transfer says and how bytes travel.

Knows no pages: a `Source` gives chunks, a `Sink` takes them. `link_transport.py` is the implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:  # clients reach this module by way of a request, and have no use for torch
    from torch import Tensor

Ticket = NewType("Ticket", int)
"""Names one stream of chunks from a sender to a receiver. Chosen by the receiver, never used twice by it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one process's transport is met."""

    name: str
    """Drawn at its start: a restarted process has another."""
    host: str
    port: int


class Source(Protocol):
    """What a send reads."""

    sizes: tuple[int, ...]
    """Bytes of each chunk; the receiver's sink has the same."""
    rooms: Sequence[Tensor]
    """Where the first chunks lie: they are sent from there. All others have to be written first."""

    def give(self, index: int, room: Tensor) -> Tensor:
        """The chunk, uint8 [sizes[index]]: written into `room`, or where it lies already, to be read there
        until the stream is over. Called in order. Raises TransferFailed to end the stream here.
        """


class Sink(Protocol):
    """What a receive writes."""

    sizes: tuple[int, ...]
    rooms: Sequence[Tensor]
    """Where the first chunks belong, to be received there. All others lie elsewhere until they are taken."""

    def take(self, index: int, chunk: Tensor) -> None:
        """Use the chunk, on a GPU in the current stream's order: its memory is used again. May raise
        TransferFailed, which ends the stream.

        Called in order, by one thread, and never once the stream's future is done.
        """

    def settle(self) -> None:
        """Wait until nothing of what was taken is still being used or written. From any thread."""

    def verify(self) -> None:
        """After the last chunk. Raises TransferFailed if any of them was not what was agreed."""


class Transport(Protocol):
    """Streams to and from other shards. A future ends at its deadline at the latest, whatever the peer does.

    Its exception is always a TransferFailed.
    """

    @property
    def endpoint(self) -> Endpoint: ...

    def send(self, peer: Endpoint, ticket: Ticket, source: Source, timeout_s: float) -> Future[None]: ...

    def receive(self, peer: Endpoint, ticket: Ticket, sink: Sink, timeout_s: float) -> Future[None]: ...

    def close(self) -> None:
        """All open streams fail. Waits for peers no longer than an operation may take."""
