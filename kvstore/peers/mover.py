"""A shard's hands: gathers pages for the transfers of its replica, verifies and stores what arrives.

Knows the pool's tensor and no books: which pages, and who may read them, is `exchange.py`'s to say. Pages
that are received belong to no one else until the exchange has published them.

On a link go the pages' bytes in chunks, and then one chunk with all their headers, whose checksums are known
by then. Large pages are chunks by themselves, sent from where they are; small ones are packed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels.layout import PageLayout
from quire.kernels.page_copy import checksum_pages, gather_pages, scatter_pages
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.bandwidth import Bandwidth
from quire.kvstore.peers.messages import CompletePages, Moved, Order, ReceivePages, SendPages
from quire.kvstore.peers.page_headers import CHECKSUM_WORD, HEADER_BYTES, header_part, page_headers
from quire.kvstore.peers.slices import PageSlice, page_slices, shard_heads
from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.threads import use_batch_scheduling
from quire.kvstore.wire.transport import Ticket, Transport

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Small enough that a dead peer is noticed soon and that stages overlap, large enough for full speed."""
_SUMS_BEHIND = 3
"""Pages of a stream that are sent before they are summed: the headers behind them are waited for, too."""


@dataclass(frozen=True, slots=True)
class ShardPool:
    """One shard's pages and where they stand among the model's."""

    pool_NB: Tensor
    layout: PageLayout
    rank: int
    tp: int
    kv_heads: int
    """Of the whole model."""


class PageMover:
    """Carries out the orders of a replica's exchange on one shard."""

    def __init__(
        self,
        pool: ShardPool,
        transport: Transport,
        *,
        limit: Bandwidth | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        """`chunk_bytes`, pages of a chunk: the same on all replicas. `limit`: of what is sent."""
        self._pool, self._transport, self._limit = pool, transport, limit
        self._chunk_bytes = chunk_bytes or CHUNK_BYTES[pool.pool_NB.device.type]
        self._sums = _ChecksumCache()

    @property
    def precomputes_checksums(self) -> bool:
        """Small pages are summed while they are packed, and a GPU sums as fast as it reads."""
        pool = self._pool
        return not pool.pool_NB.is_cuda and _alone(pool.layout.page_bytes, self._chunk_bytes)

    def precompute_checksums(self, complete: CompletePages) -> list[Future[int]]:
        """Begin the checksums for which replicas of as many shards will ask, if they are worth it."""
        if not self.precomputes_checksums:
            return []
        pool = self._pool
        held = shard_heads(pool.rank, pool.tp, pool.kv_heads)
        heads = (held.start, len(held))
        return [
            self._sums.ahead(page, generation, heads, pool.pool_NB[page])
            for page, generation in zip(complete.pages, complete.generations, strict=True)
        ]

    def execute(self, order: Order, report: Callable[[Moved], None]) -> None:
        """Begin, and report from some other thread when this shard's part is over.

        The report comes by the order's deadline, whatever the peer does. Once it has come, nothing of the
        order writes into the pool any more.
        """
        streams = [self._start(order, piece) for piece in self._pieces(order)]
        _Completion(order, self._pool.rank, streams, report).begin()

    def _pieces(self, order: Order) -> list[PageSlice]:
        pool, peers = self._pool, len(order.peers)
        receives = isinstance(order, ReceivePages)
        source_tp, destination_tp = (peers, pool.tp) if receives else (pool.tp, peers)
        slices = page_slices(source_tp, destination_tp, pool.kv_heads, pool.layout.head_bytes)
        return [s for s in slices if (s.destination if receives else s.source) == pool.rank]

    def _start(self, order: Order, piece: PageSlice) -> tuple[int, Future[None]]:
        ticket, timeout_s = Ticket(order.transfer), order.timeout_s
        if isinstance(order, SendPages):
            outgoing = Outgoing(self._pool, order, piece, self._chunk_bytes, self._sums, self._limit)
            future = self._transport.send(order.peers[piece.destination], ticket, outgoing, timeout_s)
        else:
            incoming = Incoming(self._pool, order, piece, self._chunk_bytes)
            future = self._transport.receive(order.peers[piece.source], ticket, incoming, timeout_s)
        return len(order.pages) * piece.size_bytes, future


def _alone(size_bytes: int, chunk_bytes: int) -> bool:
    """Whether each page, or what goes of it, is a chunk by itself."""
    return 2 * size_bytes > chunk_bytes


class _Pages:
    """The pages of one order, as far as one slice goes, cut into chunks.

    Names: M pages of the order, C of a chunk, W words of a header.
    """

    def __init__(self, pool: ShardPool, order: Order, piece: PageSlice, chunk_bytes: int) -> None:
        receives, device = isinstance(order, ReceivePages), pool.pool_NB.device
        at = piece.destination_at if receives else piece.source_at
        heads = (piece.first_head, piece.heads)
        headers = page_headers(order.keys, pool.layout.fingerprint, heads, order.generations)
        self._bytes_NB = pool.pool_NB[:, at : at + piece.size_bytes]
        self._order, self._piece = order, piece
        self._pages_M = torch.tensor(order.pages, device=device)
        self._headers_MW = torch.from_numpy(headers).to(device)
        self._alone = _alone(piece.size_bytes, chunk_bytes)
        in_place = self._alone and device.type != "cuda"
        self.buffers: Sequence[Tensor] = [self._bytes_NB[p] for p in order.pages] if in_place else []
        self._step = 1 if self._alone else round(chunk_bytes / piece.size_bytes)
        counts = [min(self._step, len(order.pages) - at) for at in range(0, len(order.pages), self._step)]
        self.sizes = (*(count * piece.size_bytes for count in counts), len(order.pages) * HEADER_BYTES)

    def _is_headers(self, index: int) -> bool:
        return index == len(self.sizes) - 1

    def _part(self, index: int) -> slice:
        return slice(index * self._step, (index + 1) * self._step)

    def _rows(self, chunk: Tensor) -> Tensor:
        return chunk.view(-1, self._piece.size_bytes)

    def _sum_C(self, part: slice) -> Tensor:
        return self._headers_MW[part, CHECKSUM_WORD]


_ChecksumKey = tuple[PageId, int, int]
"""Page, first head, number of heads."""


class _ChecksumCache:
    """Checksums of large pages, by threads of their own, beside the link's thread that sends.

    They are kept: what the page of a complete block holds in one generation never changes.
    """

    def __init__(self) -> None:
        self._asked_worker = ThreadPoolExecutor(1, "quire-sums", initializer=use_batch_scheduling)
        self._ahead_worker = ThreadPoolExecutor(1, "quire-sums-ahead", initializer=use_batch_scheduling)
        """Many may be in line there; no transfer waits for that."""
        self._known: dict[_ChecksumKey, tuple[int, Future[int]]] = {}
        self._ahead: dict[_ChecksumKey, tuple[int, Future[int]]] = {}
        """Generation and sum; these have not been asked for yet."""

    def of(self, page: PageId, generation: int, heads: tuple[int, int], bytes_B: Tensor) -> Future[int]:
        name = (page, *heads)
        known = self._known.get(name)
        if known is None or known[0] != generation:
            known = self._ahead.pop(name, None)
            if known is None or known[0] != generation or known[1].cancel():  # it has not begun
                known = generation, self._begin(bytes_B)
            self._known[name] = known
        return known[1]

    def ahead(self, page: PageId, generation: int, heads: tuple[int, int], bytes_B: Tensor) -> Future[int]:
        future = self._ahead_worker.submit(_sum, bytes_B)
        self._ahead[page, *heads] = generation, future
        return future

    def _begin(self, bytes_B: Tensor) -> Future[int]:
        if not bytes_B.is_cuda:
            return self._asked_worker.submit(_sum, bytes_B)
        done: Future[int] = Future()
        done.set_result(_sum(bytes_B))  # in the link's stream: beside the steps, not between them
        return done


def _sum(bytes_B: Tensor) -> int:
    return int(checksum_pages(bytes_B[None]))


class Outgoing(_Pages):
    """A `Source` of pages."""

    def __init__(
        self,
        pool: ShardPool,
        order: SendPages,
        piece: PageSlice,
        chunk_bytes: int,
        sums: _ChecksumCache,
        limit: Bandwidth | None,
    ) -> None:
        super().__init__(pool, order, piece, chunk_bytes)
        self._sums, self._limit = sums, limit
        self._sum_M: list[Future[int]] = []
        """Of large pages."""

    def read_chunk(self, index: int, buffer: Tensor) -> Tensor:
        if self._limit is not None:
            self._limit.wait(buffer.numel())
        if self._is_headers(index):
            for page, sum_ in enumerate(self._sum_M):
                self._headers_MW[page, CHECKSUM_WORD] = sum_.result()
            return buffer.copy_(_as_bytes(self._headers_MW))
        if self._alone:
            return self._large(index)
        part = self._part(index)
        gather_pages(self._bytes_NB, self._pages_M[part], self._rows(buffer), self._sum_C(part))
        return buffer

    def _large(self, index: int) -> Tensor:
        if index >= _SUMS_BEHIND:
            self._sum_M[index - _SUMS_BEHIND].result()
        page, generation = self._order.pages[index], self._order.generations[index]
        heads, bytes_B = (self._piece.first_head, self._piece.heads), self._bytes_NB[page]
        self._sum_M.append(self._sums.of(page, generation, heads, bytes_B))
        return bytes_B


class Incoming(_Pages):
    """A `Sink` for pages. Until it has verified them, they may hold anything."""

    def __init__(self, pool: ShardPool, order: ReceivePages, piece: PageSlice, chunk_bytes: int) -> None:
        super().__init__(pool, order, piece, chunk_bytes)
        self._arrived_MW = torch.zeros_like(self._headers_MW)
        self._stream: torch.cuda.Stream | None = None
        """That of the chunks that were taken."""

    def write_chunk(self, index: int, chunk: Tensor) -> None:
        if chunk.is_cuda:
            self._stream = torch.cuda.current_stream(chunk.device)
        if self._is_headers(index):
            _as_bytes(self._arrived_MW).copy_(chunk)
            return
        part = self._part(index)
        if index < len(self.buffers):
            self._sum_C(part).copy_(checksum_pages(self._rows(chunk)))
        else:
            scatter_pages(self._bytes_NB, self._pages_M[part], self._rows(chunk), self._sum_C(part))

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def verify(self) -> None:
        wrong = (self._arrived_MW != self._headers_MW).nonzero().tolist()
        if wrong:
            block, word = wrong[0]
            part = header_part(word)
            cause = Cause.CHECKSUM if part == "checksum" else Cause.HEADER
            name = self._order.keys[block].hex()[:12]
            raise TransferFailed(cause, f"block {name} arrived with another {part} than was agreed")


def _as_bytes(headers_MW: Tensor) -> Tensor:
    return headers_MW.view(torch.uint8).view(-1)


class _Completion:
    """Counts the ends of an order's streams and makes one report of them."""

    def __init__(
        self,
        order: Order,
        rank: int,
        streams: Sequence[tuple[int, Future[None]]],
        report: Callable[[Moved], None],
    ) -> None:
        self._order, self._rank, self._streams, self._report = order, rank, streams, report
        self._started_s = time.monotonic()
        self._open = len(streams)
        self._lock = threading.Lock()

    def begin(self) -> None:
        if not self._streams:  # another shard that holds the same heads sends them
            self._finish()
        for _, future in self._streams:
            future.add_done_callback(self._one_more)

    def _one_more(self, future: Future[None]) -> None:
        with self._lock:
            self._open -= 1
            last = self._open == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        errors = [error for _, future in self._streams if (error := future.exception()) is not None]
        failure = errors[0] if errors else None
        self._report(
            Moved(
                transfer=self._order.transfer,
                rank=self._rank,
                received=isinstance(self._order, ReceivePages),
                seconds=time.monotonic() - self._started_s,
                bytes_moved=0 if errors else sum(size for size, _ in self._streams),
                failure=failure.cause if isinstance(failure, TransferFailed) else None,
                reason="" if failure is None else str(failure),
            )
        )
