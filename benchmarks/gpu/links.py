"""Transfers between two GPUs over NCCL beside raw sends of the same bytes.

With one GPU both ends share it and talk through loopback sockets, as if they were two hosts: NCCL refuses
anything else. Pages as an 8B model's shard has them (32 layers, 8 kv heads of 128). A transfer is what both
shards do, from the order to the report: gather, sum, send, verify, scatter. Raw is NCCL alone in the same two
processes, as one message and cut into the chunks that links send.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.rows import Row, alternate, median
from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout
from quire.kvstore.books.keys import KeySpace, extend_chain
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.peers.messages import Moved, ReceivePages, SendPages
from quire.kvstore.peers.mover import CHUNK_BYTES, PageMover, ShardPool
from quire.kvstore.wire.groups import host_store, join_store
from quire.kvstore.wire.nccl import NcclTransport, Pair
from quire.kvstore.wire.transport import LinkConfig

LAYERS, HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 64
HOST, PATIENCE_S, LIMIT_S = "127.0.0.1", 10.0, 60.0
ROUNDS = 7
_CHUNK = CHUNK_BYTES["cuda"]


def measure(_: Ceilings) -> Iterator[Row]:
    """Rows of all formats."""
    two = torch.cuda.device_count() > 1
    where, blocks = ("two GPUs", 256) if two else ("one GPU, loopback sockets", 64)
    for kv in ("bf16", "int8", "int4"):
        yield from _rows_of(kv, blocks, where, 1 if two else 0)


def _rows_of(kv: str, blocks: int, where: str, second: int) -> Iterator[Row]:
    context, store = get_context("spawn"), host_store(HOST, PATIENCE_S)
    ends, processes = [], []
    for rank, device in enumerate((0, second)):
        ours, theirs = context.Pipe()
        arguments = (rank, device, second == 0, kv, blocks, store.port, theirs)
        process = context.Process(target=_end, args=arguments, daemon=True)
        process.start()
        ends.append(ours)
        processes.append(process)
    try:
        endpoints = [_answer(end) for end in ends]
        for end in ends:
            end.send(endpoints)
        before = [_answer(end) for end in ends]

        def together(*what: object) -> float:
            started = time.perf_counter()
            for end in ends:
                end.send(what)
            for end in ends:
                _answer(end)
            return time.perf_counter() - started

        first_s = together("move", 0)
        after = _values(ends, "memory")
        assert _values(ends, "digest")[0] == _values(ends, "digest")[1]
        calls = {
            "transfer": lambda i: together("move", i + 1),
            "raw": lambda _: together("raw", 0),
            "chunks": lambda _: together("raw", _CHUNK),
        }
        for call in calls.values():
            call(ROUNDS)
        seconds = {name: median(times) for name, times in alternate(calls, ROUNDS).items()}
    finally:
        for process in processes:
            process.kill()
            process.join()
    size = blocks * _layout(kv).page_bytes
    case = f"{where}, {kv}, {blocks} blocks, {size / 1e6:.0f} MB"
    rate = size / seconds["transfer"] / 1e9
    yield Row(case, "transfer", rate, "GB/s", "one raw message", seconds["raw"] / seconds["transfer"])
    chunked = seconds["chunks"] / seconds["transfer"]
    yield Row(case, "transfer in chunks", rate, "GB/s", "raw chunks", chunked)
    yield Row(
        case,
        "first transfer, link opened",
        first_s,
        "s",
        "transfer",
        first_s / seconds["transfer"],
    )
    link_bytes = max(b - a for a, b in zip(before, after, strict=True))
    yield Row(case, "memory of a link", link_bytes / 1e6, "MB", "3 chunks", link_bytes / 3 / _CHUNK)


def _values(ends: list[Connection], what: str) -> list[Any]:
    for end in ends:
        end.send((what,))
    return [_answer(end) for end in ends]


def _answer(end: Connection) -> Any:
    if not end.poll(LIMIT_S):
        raise TimeoutError("an end of the link does not answer")
    return end.recv()


def _layout(kv: str) -> PageLayout:
    return PageLayout(layer_formats(kv, LAYERS), HEADS, HEAD_DIM, PAGE_TOKENS)


def _end(rank: int, device: int, alone: bool, kv: str, blocks: int, port: int, parent: Connection) -> None:
    """Rank 0 owns the blocks, rank 1 takes them."""
    if alone:
        os.environ.update({"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo"})
    torch.cuda.set_device(device)
    here, layout = torch.device("cuda", device), _layout(kv)
    pool_NB = torch.zeros(blocks, layout.page_bytes, dtype=torch.uint8, device=here)
    if rank == 0:
        pool_NB.random_(0, 256)
    transport = NcclTransport(HOST, here, LinkConfig(operation_timeout_s=PATIENCE_S))
    mover = PageMover(ShardPool(pool_NB, layout, 0, 1, HEADS), transport)
    keys = tuple(extend_chain(KeySpace(b"l", b"m", b"t").root(), range(PAGE_TOKENS * blocks), PAGE_TOKENS))
    pages, generations = tuple(torch.randperm(blocks).tolist()), (1,) * blocks
    buffer = torch.zeros_like(pool_NB).view(-1)
    parent.send(transport.endpoint)
    peers = (parent.recv()[1 - rank],)
    torch.cuda.synchronize()
    parent.send(_used_bytes())
    pair: Pair | None = None
    while True:
        match parent.recv():
            case ("move", number):
                common = (pages, generations, peers, LIMIT_S)
                ticket = TransferId(number + 1)
                order = (
                    SendPages(ReplicaId("receiver"), ticket, keys, *common)
                    if rank == 0
                    else ReceivePages(ticket, keys, *common)
                )
                done: Future[Moved] = Future()
                mover.execute(order, done.set_result)
                moved = done.result(LIMIT_S)
                assert moved.failure is None, moved.reason
                parent.send(None)
            case ("raw", chunk_bytes):
                if pair is None:
                    met = PrefixStore("raw", join_store(HOST, port, PATIENCE_S))
                    pair = Pair(met, rank=rank, device=here, timeout_s=PATIENCE_S)
                _raw(pair, buffer, chunk_bytes or buffer.numel())
                parent.send(None)
            case ("memory",):
                parent.send(_used_bytes())
            case ("digest",):
                at = torch.tensor(pages, device=here)
                parent.send(int(pool_NB[at].view(torch.int64).sum()))


def _raw(pair: Pair, buffer: Tensor, chunk_bytes: int) -> None:
    under_way: deque[Any] = deque()
    for index, chunk in enumerate(buffer.split(chunk_bytes)):
        if len(under_way) == LinkConfig().depth:
            pair.wait(under_way.popleft(), PATIENCE_S)
        under_way.append(pair.post(chunk, index))
    for work in under_way:
        pair.wait(work, PATIENCE_S)


def _used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
