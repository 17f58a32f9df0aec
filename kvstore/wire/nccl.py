"""Streams between GPUs: begun and acknowledged over TCP, as between CPUs, while the chunks go by NCCL.

    sender     →  header   as between CPUs
               →  link     a number: which NCCL communicator the sender has for this peer, or would call so
    receiver   ←  port      0: it has this one, too; otherwise the port of a store, at which both build it
    sender     →  chunks   by NCCL
    receiver   ←  ack      as between CPUs

Communicators are kept for the next stream to or from the same peer. Any error or deadline drops this end's,
so that the next stream builds another one.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.groups import host_store, join_store
from quire.kvstore.wire.stream import Stream
from quire.kvstore.wire.tcp import TcpTransport, receive, send
from quire.kvstore.wire.transport import LinkConfig, Sink, Source

_NUMBER_BYTES = 8
_PORT = struct.Struct("<H")
_POLL_S = 50e-6
_CTAS = 8
"""Multiprocessors of the GPU that a communicator may use: few, because steps run beside it."""
_NEVER = timedelta(days=1)
_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # a lost peer would end the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # so would an abort that takes long
}


class Pair:
    """A communicator of two GPUs, in which rank 0 sends and rank 1 receives. Errors raise RuntimeError."""

    def __init__(self, store: Store, *, rank: int, device: torch.device, timeout_s: float) -> None:
        """Connect: both ends construct it within `timeout_s`. Its loss is no other group's."""
        for name, value in _SETTINGS.items():
            os.putenv(name, value)  # torch reads them here and offers no other way
        os.putenv("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(max(round(timeout_s), 1)))  # whole seconds
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER  # `wait` has deadlines of its own
        options.config.blocking = 0
        options.config.max_ctas = _CTAS
        self._rank = rank
        self._group: Any = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, 2, options)
        self._group.eager_connect_single_device(device)  # or sends would get a second communicator

    def post(self, chunk: Tensor, tag: int) -> dist.Work:
        """Begin to send `chunk`, or to receive into it: in use until `wait` or `drop` has returned."""
        move = self._group.send if self._rank == 0 else self._group.recv
        work: dist.Work = move([chunk], 1 - self._rank, tag)
        return work

    def wait(self, work: dist.Work, timeout_s: float) -> None:
        """Wait for an operation. A late peer raises RuntimeError, and so does one that NCCL knows is dead."""
        end_s = time.monotonic() + timeout_s
        while not work.is_completed():  # NCCL's own wait would only make the stream wait
            if time.monotonic() > end_s:
                raise RuntimeError(f"the other end was silent for {timeout_s:.3g} s")
            time.sleep(_POLL_S)
        result = work.get_future_result()  # type: ignore[attr-defined]
        if result.done() and result.value():  # it is completed as well once NCCL has noticed a dead peer
            raise RuntimeError("NCCL lost the other end")

    def drop(self) -> None:
        """Abort all operations. No further call is made."""
        self._group.abort()


class _Link:
    """One end of a communicator, with the memory that chunks go through and the CUDA stream for it."""

    def __init__(self, number: bytes, pair: Pair, device: torch.device) -> None:
        self.number, self.pair, self._device = number, pair, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._memory: dict[int, Tensor] = {}

    def buffer(self, slot: int, size: int) -> Tensor:
        """Memory of the link. It goes with it: what is still under way then may write there, nowhere else."""
        if slot not in self._memory or self._memory[slot].numel() < size:
            self._memory[slot] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory[slot][:size]


@dataclass
class _Slot:
    """Where a stream finds the link to its peer, or puts another one."""

    link: _Link | None

    def drop(self) -> None:
        if self.link is not None:
            link, self.link = self.link, None
            link.pair.drop()


class _Links:
    """The links of one direction. Those that no stream uses are kept by peer, the one idle longest first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: OrderedDict[str, _Slot] = OrderedDict()
        self._users: set[Stream[Any]] = set()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, stream: Stream[Any]) -> Iterator[_Slot]:
        """Lend the stream the link to its peer, if there is one; it is kept if the stream goes well."""
        slot, oldest = self._take(stream)
        try:
            if oldest is not None:
                oldest.drop()
            yield slot
        except BaseException:
            slot.drop()
            raise
        finally:
            self._put_back(stream, slot).drop()

    def clear(self) -> list[_Slot]:
        """Return the idle links, which are kept no longer."""
        with self._lock:
            slots = list(self._idle.values())
            self._idle.clear()
        return slots

    def _take(self, stream: Stream[Any]) -> tuple[_Slot, _Slot | None]:
        """Return the peer's slot and the one that makes room. A thread that hangs in NCCL counts no more."""
        with self._lock:
            slot, oldest = self._idle.pop(stream.peer.name, None), None
            self._users = {user for user in self._users if not user.ended}
            if slot is None and len(self._idle) + len(self._users) >= self._most:
                if not self._idle:
                    raise TransferFailed(Cause.BUSY, f"all {self._most} links are in use: raise max_links")
                _, oldest = self._idle.popitem(last=False)
            self._users.add(stream)
        return slot or _Slot(None), oldest

    def _put_back(self, stream: Stream[Any], slot: _Slot) -> _Slot:
        """Return what is not kept: the link of a stream that was given up, or one that was replaced."""
        with self._lock:
            self._users.discard(stream)
            if slot.link is None or stream.ended:
                return slot
            before = self._idle.pop(stream.peer.name, None)
            self._idle[stream.peer.name] = slot
            return before or _Slot(None)


class NcclTransport(TcpTransport):
    """The `Transport` of a shard whose pool is on a GPU."""

    def __init__(self, host: str, device: torch.device, config: LinkConfig | None = None) -> None:
        """`host`: the address at which peers reach this process, and the only one it listens at."""
        self._device = device
        most = (config or LinkConfig()).max_links
        self._out, self._in = _Links(most), _Links(most)
        super().__init__(host, config)

    def close(self) -> None:
        """Fail all open streams and drop all links. Waits no longer than two operations may take."""
        super().close()
        for slot in (*self._out.clear(), *self._in.clear()):
            self._begin(slot.drop)
        self._join()

    def _surroundings(self) -> Any:
        if self._device.type != "cuda":
            return super()._surroundings()
        return torch.cuda.device(self._device)

    def _send_chunks(self, stream: Stream[Source], connection: socket.socket) -> None:
        with self._out.use(stream) as slot:
            number = slot.link.number if slot.link else secrets.token_bytes(_NUMBER_BYTES)
            send(connection, number, stream.until_s(self._patience_s))
            (port,) = _PORT.unpack(receive(connection, _PORT.size, stream.until_s(self._patience_s)))
            if port:
                slot.drop()
                slot.link = self._link(number, join_store(stream.peer.host, port, self._patience_s), 0)
            if slot.link is None:
                raise TransferFailed(Cause.HEADER, f"{stream.peer.host} has a link that this end has not")
            with torch.cuda.stream(slot.link.stream):
                self._post_out(stream, slot.link)

    def _receive_chunks(self, stream: Stream[Sink], connection: socket.socket) -> None:
        with self._in.use(stream) as slot:
            number = receive(connection, _NUMBER_BYTES, stream.until_s(self._patience_s))
            known = slot.link is not None and slot.link.number == number
            if not known:
                slot.drop()
                store = host_store(self.endpoint.host, self._patience_s)
            port = 0 if known else store.port
            send(connection, _PORT.pack(port), stream.until_s(self._patience_s))
            if not known:
                slot.link = self._link(number, store, 1)
            assert slot.link is not None
            with torch.cuda.stream(slot.link.stream):
                self._post_in(stream, slot.link)

    def _link(self, number: bytes, store: Store, rank: int) -> _Link:
        pair = Pair(store, rank=rank, device=self._device, timeout_s=self._patience_s)
        return _Link(number, pair, self._device)

    def _post_out(self, stream: Stream[Source], link: _Link) -> None:
        body, depth, under_way = stream.body, self._config.depth, deque[dist.Work]()
        for index, size in enumerate(body.sizes):
            if len(under_way) == depth:
                self._wait(stream, link, under_way.popleft())
            stream.check()
            chunk = body.read_chunk(index, link.buffer(index % depth, size))
            under_way.append(link.pair.post(chunk, index))
        while under_way:
            self._wait(stream, link, under_way.popleft())

    def _post_in(self, stream: Stream[Sink], link: _Link) -> None:
        body, depth = stream.body, self._config.depth
        arriving = deque[tuple[Tensor, dist.Work]]()

        def post(index: int) -> None:
            if index < len(body.sizes):
                buffer = link.buffer(index % depth, body.sizes[index])
                arriving.append((buffer, link.pair.post(buffer, index)))

        stream.check()
        for index in range(depth):
            post(index)
        for index in range(len(body.sizes)):
            buffer, work = arriving.popleft()
            self._wait(stream, link, work)
            with stream.lock:
                stream.check()
                body.write_chunk(index, buffer)
            post(index + depth)
        body.verify()

    def _wait(self, stream: Stream[Any], link: _Link, work: dist.Work) -> None:
        """For a chunk; never past the stream's deadline."""
        link.pair.wait(work, stream.until_s(self._patience_s) - time.monotonic())
