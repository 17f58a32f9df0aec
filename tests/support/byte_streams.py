"""Sources and sinks of known bytes, and transports in processes of their own, for tests of links."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from quire.kvstore.wire.tcp import TcpTransport
from quire.kvstore.wire.transport import Endpoint, LinkConfig, Ticket

HOST = "127.0.0.1"
QUICK, PATIENT = LinkConfig(operation_timeout_s=1.0), LinkConfig(operation_timeout_s=10.0)
"""For tests in which a peer is given up, and for those in which none should be, however busy the machine."""


def pattern(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@dataclass
class Numbers:
    """A source of chunks that tell themselves apart. `signal_at` = (chunk, signal): sent to this process."""

    sizes: tuple[int, ...]
    seed: int = 0
    signal_at: tuple[int, int] | None = None
    pause_s: float = 0.0
    buffers: list[Tensor] = field(default_factory=list)

    def read_chunk(self, index: int, buffer: Tensor) -> Tensor:
        if self.signal_at is not None and index == self.signal_at[0]:
            os.kill(os.getpid(), self.signal_at[1])
        time.sleep(self.pause_s)
        return buffer.copy_(pattern(self.sizes[index], self.seed + index))


@dataclass
class Collect:
    """A sink that keeps all it is given."""

    sizes: tuple[int, ...]
    chunks: list[Tensor] = field(default_factory=list)
    signal_at: tuple[int, int] | None = None
    buffers: list[Tensor] = field(default_factory=list)

    def write_chunk(self, index: int, chunk: Tensor) -> None:
        assert index == len(self.chunks)
        if self.signal_at is not None and index == self.signal_at[0]:
            os.kill(os.getpid(), self.signal_at[1])
        self.chunks.append(chunk.clone())

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def verify(self) -> None:
        """Bytes are what they are."""

    def holds(self, seed: int) -> bool:
        return len(self.chunks) == len(self.sizes) and all(
            torch.equal(chunk, pattern(size, seed + i))
            for i, (chunk, size) in enumerate(zip(self.chunks, self.sizes, strict=True))
        )


def stream_process(control: Connection) -> None:
    """Orders: ("send" | "receive", peer, ticket, sizes, signal_at, timeout_s). Replies: an error or None."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    transport = TcpTransport(HOST, PATIENT)
    control.send(transport.endpoint)
    while (order := control.recv()) is not None:
        what, peer, ticket, sizes, signal_at, timeout_s = order
        assert isinstance(peer, Endpoint)
        if what == "send":
            future = transport.send(peer, Ticket(ticket), Numbers(sizes, ticket, signal_at), timeout_s)
        else:
            sink = Collect(sizes, signal_at=signal_at)
            future = transport.receive(peer, Ticket(ticket), sink, timeout_s)
        error = future.exception()
        if what == "receive" and error is None and not sink.holds(ticket):
            control.send("wrong bytes")
        else:
            control.send(None if error is None else str(error))


SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
