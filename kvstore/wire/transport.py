"""How chunks of bytes move between two shards: the seam between transfers and networks.

Knows no pages: chunks are read from a `Source` and written to a `Sink`. `tcp.py` implements it for CPUs,
`nccl.py` for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, NewType, Protocol

import torch
from msgspec import Meta, Struct
from torch import Tensor

Ticket = NewType("Ticket", int)
"""Names one stream of chunks from a sender to a receiver. Chosen by the receiver, never used twice by it."""


class Endpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """The address of one process's transport."""

    name: str
    """Chosen at random when the process starts, so that a restarted process has another one."""
    host: str
    port: Annotated[int, Meta(ge=0, le=65535)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """How transports behave; the same on all replicas of a deployment."""

    operation_timeout_s: float = 1.0
    """A peer that lets a chunk wait longer is given up."""
    max_streams: int = 256
    """Streams of each direction at once; more are refused."""
    max_links: int = 4
    """Between GPUs, NCCL communicators of each direction; the one idle longest makes room. Each takes about a
    third of a gigabyte of GPU memory, and over a second to connect."""
    depth: int = 3
    """Between GPUs, chunks under way at once, each in memory of the link."""

    def __post_init__(self) -> None:
        if self.operation_timeout_s <= 0 or min(self.max_streams, self.max_links, self.depth) < 1:
            raise ValueError(f"all numbers of a LinkConfig are positive, got {self}")

    @staticmethod
    def on(device: torch.device) -> LinkConfig:
        """Return the defaults for shards on this device."""
        return LinkConfig(operation_timeout_s=3.0 if device.type == "cuda" else 1.0)


class Source(Protocol):
    """The chunks that a stream sends."""

    sizes: tuple[int, ...]
    """Bytes of each chunk; the receiver's sink has the same."""
    buffers: Sequence[Tensor]
    """Memory that holds the first chunks and that they are sent from. All others have to be written first."""

    def read_chunk(self, index: int, buffer: Tensor) -> Tensor:
        """Return the chunk, uint8 [sizes[index]]: either `buffer`, after writing the chunk into it, or the
        memory that holds it, which may be read until the stream has ended. Called in order.

        Raises TransferFailed to end the stream.
        """


class Sink(Protocol):
    """Where a stream puts the chunks that it receives."""

    sizes: tuple[int, ...]
    """Bytes of each chunk."""
    buffers: Sequence[Tensor]
    """Memory that the first chunks are received into directly. All others go through memory of the stream."""

    def write_chunk(self, index: int, chunk: Tensor) -> None:
        """Use the chunk, on a GPU in the order of the current stream: its memory is reused afterwards.

        Called in order, by one thread, and never after the stream's future is done. Raises TransferFailed to
        end the stream.
        """

    def synchronize(self) -> None:
        """Wait until nothing that was passed to `write_chunk` is still in use. Called from any thread."""

    def verify(self) -> None:
        """Called after the last chunk. Raises TransferFailed if a chunk was not what was agreed."""


class Transport(Protocol):
    """Streams to and from other shards. A stream's future is done by its deadline, whatever the peer does.

    Its exception is always a TransferFailed.
    """

    @property
    def endpoint(self) -> Endpoint: ...

    def send(self, peer: Endpoint, ticket: Ticket, source: Source, timeout_s: float) -> Future[None]: ...

    def receive(self, peer: Endpoint, ticket: Ticket, sink: Sink, timeout_s: float) -> Future[None]: ...

    def close(self) -> None:
        """Fail all open streams. Waits for peers no longer than one operation may take."""
