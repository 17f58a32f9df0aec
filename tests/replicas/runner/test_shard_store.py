"""Pages leave and reach every shard of a replica: over links to another one, by copies to host memory."""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path

import psutil
import pytest
import torch
from shard_threads import Threads
from store_peers import keys_of
from tiny_models import Chunk, make_model, reference_logits, some_tokens, step_of, tiny_config
from torch import Tensor

from quire.kvstore.books.host_tier import Copies, SlotId
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers import mover
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.peers.messages import CompletePages, Moved, ReceivePages, SendPages
from quire.kvstore.peers.slices import shard_heads
from quire.kvstore.wire.failures import Cause
from quire.kvstore.wire.transport import LinkConfig
from quire.replicas.config import EngineConfig
from quire.replicas.errors import ConfigError, ReplicaDied
from quire.replicas.runner import executor as executor_module
from quire.replicas.runner import shard_process
from quire.replicas.runner.executor import Executor
from quire.replicas.runner.local_processes import LocalProcesses
from quire.replicas.runner.shard_process import ShardSpec
from quire.replicas.runner.shard_store import ShardStore

IDS = some_tokens(40)
PAGES_A, PAGES_B = (3, 1), (6, 2)
WRITE = step_of([Chunk(IDS[:32], 0, PAGES_A)], 16)
READ_A = step_of([Chunk(IDS[32:], 32, [*PAGES_A, 0])], 16)
READ_B = step_of([Chunk(IDS[32:], 32, [*PAGES_B, 0])], 16)
KEYS = tuple(keys_of(2))
LINKS = LinkConfig(operation_timeout_s=1.0)
HEADS = 2  # of the tiny model

_transfers = count()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _threads_of_this_process():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Replica:
    """An executor whose shards' pools can be looked at. A context."""

    def __init__(self, config: EngineConfig, links: LinkConfig | None = LINKS, launcher=None) -> None:
        self.pools: dict[int, Tensor] = {}
        self.stores: dict[int, ShardStore] = {}
        outer = self

        class Seen(ShardStore):
            def __init__(self, shard, config, rank, **options) -> None:
                super().__init__(shard, config, rank, **options)
                outer.pools[rank], outer.stores[rank] = shard.pool, self

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard_process, "ShardStore", Seen)
            patch.setattr(executor_module, "ShardStore", Seen)
            self.executor = Executor(config, launcher or Threads(), links=links)
        self.tp = config.tp
        self.reports: queue.Queue[Moved] = queue.Queue()

    def heads(self, page: int) -> list[list[Tensor]]:
        """By head: its bytes in this page, on every shard that holds it."""
        found: list[list[Tensor]] = [[] for _ in range(HEADS)]
        for rank, pool_NB in sorted(self.pools.items()):
            held = shard_heads(rank, self.tp, HEADS)
            for head, bytes_B in zip(held, pool_NB[page].chunk(len(held)), strict=True):
                found[head].append(bytes_B)
        return found

    def send(self, to: Replica, transfer: TransferId) -> None:
        peers = to.executor.endpoints
        pages = tuple(map(PageId, PAGES_A))
        order = SendPages(ReplicaId("b"), transfer, KEYS, pages, (4, 5), peers, 60.0)
        self.executor.execute(order, self.reports.put)

    def receive(self, source: Replica, transfer: TransferId, timeout_s: float = 60.0) -> None:
        peers = source.executor.endpoints
        pages = tuple(map(PageId, PAGES_B))
        order = ReceivePages(transfer, KEYS, pages, (4, 5), peers, timeout_s)
        self.executor.execute(order, self.reports.put)

    def reported(self) -> list[Moved]:
        """What came of an order, by rank."""
        return sorted((self.reports.get(timeout=60) for _ in range(self.tp)), key=lambda moved: moved.rank)

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.close()


def config_of(llama: Path, tp: int = 1, host_bytes: int = 0) -> EngineConfig:
    config = tiny_config(llama, tp=tp, threads_per_shard=1)
    return replace(config, pool=replace(config.pool, host_bytes=host_bytes))


def until(true: Callable[[], bool], within_s: float = 60) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def our_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name.startswith("quire-")}


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("tcp")
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(
    ("source_tp", "destination_tp"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (1, 4)], ids=str
)
def test_pages_of_a_step_arrive_on_every_shard_byte_for_byte(llama, source_tp, destination_tp):
    """2 kv heads: with 4 shards, every head lies on two of them."""
    with (
        Replica(config_of(llama, source_tp)) as source,
        Replica(config_of(llama, destination_tp)) as destination,
    ):
        source.executor.run(WRITE)
        transfer = TransferId(next(_transfers))
        destination.receive(source, transfer)
        source.send(destination, transfer)
        for replica, received in ((source, False), (destination, True)):
            reports = replica.reported()
            assert [(moved.rank, moved.received) for moved in reports] == [
                (rank, received) for rank in range(replica.tp)
            ]
            assert [moved.failure for moved in reports] == [None] * replica.tp
        arrived = destination.executor.run(READ_B)
        torch.testing.assert_close(arrived, reference_logits(llama, IDS)[32:], atol=1e-4, rtol=0)
        for page_a, page_b in zip(PAGES_A, PAGES_B, strict=True):
            for sent, got in zip(source.heads(page_a), destination.heads(page_b), strict=True):
                assert sent[0].any()
                assert len(got) == max(destination_tp // HEADS, 1)
                assert all(torch.equal(bytes_B, sent[0]) for bytes_B in got)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_peer_that_sends_nothing_costs_no_step_and_every_shard_reports_in_time(llama, tp):
    with Replica(config_of(llama)) as silent, Replica(config_of(llama, tp)) as replica:
        started_s = time.monotonic()
        replica.receive(silent, TransferId(next(_transfers)), timeout_s=1.0)
        steps = 0
        while replica.reports.qsize() < tp and time.monotonic() - started_s < 60:
            replica.executor.run(WRITE)
            steps += 1
        assert time.monotonic() - started_s > 0.9
        assert steps > 5
        assert [moved.failure for moved in replica.reported()] == [Cause.DEADLINE] * tp


@pytest.mark.parametrize("tp", [1, 2])
def test_every_shard_sums_complete_pages_ahead(llama, tp, monkeypatch):
    """A byte that one of them changes afterwards is noticed at the first transfer."""
    monkeypatch.setitem(mover.CHUNK_BYTES, "cpu", 1000)  # so that these pages are large
    with Replica(config_of(llama, tp)) as owner, Replica(config_of(llama, tp)) as receiver:
        owner.executor.run(WRITE)
        owner.executor.precompute_checksums(CompletePages((), ()))
        owner.executor.precompute_checksums(CompletePages(tuple(map(PageId, PAGES_A)), (4, 5)))
        until(lambda: all(sums_known(store) == 2 for store in owner.stores.values()))
        owner.pools[tp - 1][PAGES_A[1], 7] ^= 1
        transfer = TransferId(next(_transfers))
        receiver.receive(owner, transfer)
        owner.send(receiver, transfer)
        assert [moved.failure for moved in receiver.reported()] == [None] * (tp - 1) + [Cause.CHECKSUM]


def sums_known(store: ShardStore) -> int:
    return sum(future.done() for _, future in list(store._mover._sums._ahead.values()))


@pytest.mark.parametrize("tp", [1, 2])
def test_demoted_pages_come_back_in_the_order_of_the_calls(llama, tp):
    page_bytes = 2 * 2 * 16 * 32 * 4 * HEADS // tp  # layers, sides, tokens, head_dim, fp32
    with Replica(config_of(llama, tp, host_bytes=3 * page_bytes + 1), links=None) as replica:
        executor = replica.executor
        assert (executor.host_slots, executor.endpoints) == (3, ())
        executor.run(WRITE)
        executor.demote(Copies((), ()))
        slots = (SlotId(2), SlotId(0))
        executor.demote(Copies(tuple(map(PageId, PAGES_A)), slots))
        executor.run(step_of([Chunk(some_tokens(32, seed=1), 0, PAGES_A)], 16))  # takes the pages over
        executor.promote(Copies((), ()))
        executor.promote(Copies(tuple(map(PageId, PAGES_B)), slots))
        executor.demote(Copies(tuple(map(PageId, PAGES_A)), slots))  # after the promotion
        back = executor.run(READ_B)
        torch.testing.assert_close(back, reference_logits(llama, IDS)[32:], atol=1e-4, rtol=0)
        executor.promote(Copies(tuple(map(PageId, PAGES_B)), slots))
        executor.run(READ_B)
        until(lambda: all(torch.equal(p[list(PAGES_A)], p[list(PAGES_B)]) for p in replica.pools.values()))


def test_the_smallest_host_tier_counts(llama):
    small, large = config_of(llama, 2, 1 << 16), config_of(llama, 2, 1 << 17)
    launcher = Threads(lambda spec: replace(spec, config=small))
    with Replica(large, None, launcher) as replica:
        page_bytes = replica.executor.shard.layout.page_bytes
        assert replica.executor.host_slots == (1 << 16) // page_bytes


def test_a_host_tier_that_holds_no_page_is_refused(llama):
    with pytest.raises(ConfigError, match=r"pool\.host_bytes is 100, but a page has 16384; raise it"):
        Executor(config_of(llama, host_bytes=100))


def test_a_host_tier_that_one_rank_refuses_ends_the_start_and_leaves_nothing(llama):
    before, sockets = our_threads(), listening()

    def too_small(spec: ShardSpec) -> ShardSpec:
        return replace(spec, config=config_of(llama, 2, 100))

    launcher = Threads(too_small)
    with pytest.raises(ConfigError, match="a page has 8192"):
        Executor(config_of(llama, 2), launcher, links=LINKS)
    assert launcher.failure() == "shards [1] ended"
    del launcher  # its errors hold what was there when they were raised
    gc.collect()
    until(lambda: our_threads() <= before and listening() <= sockets)


def test_without_links_nothing_listens(llama):
    before = listening()
    executor = Executor(config_of(llama))
    assert (executor.endpoints, executor.host_slots, listening()) == ((), 0, before)
    executor.close()


@pytest.mark.parametrize("tp", [1, 2])
def test_closing_fails_what_is_under_way_and_leaves_no_thread_and_no_socket(llama, tp):
    threads, before = our_threads(), listening()
    with Replica(config_of(llama)) as silent:
        replica = Replica(config_of(llama, tp))
        sockets = {(e.host, e.port) for e in replica.executor.endpoints}
        assert len(sockets) == tp
        assert sockets <= listening() - before
        replica.receive(silent, TransferId(next(_transfers)), timeout_s=300)
        replica.executor.run(WRITE)  # all shards have begun
        started_s = time.monotonic()
        replica.executor.close()
        replica.executor.close()
        assert time.monotonic() - started_s < 60  # far below the transfer's timeout
        assert replica.reports.get(timeout=60).failure is Cause.CLOSED
        until(lambda: not sockets & listening())
    until(lambda: our_threads() <= threads)


def test_shards_in_processes_of_their_own_take_part_and_one_that_is_killed_ends_the_replica(llama):
    before = children()
    with Replica(config_of(llama)) as source, Replica(config_of(llama, 2), launcher=LocalProcesses()) as two:
        source.executor.run(WRITE)
        transfer = TransferId(next(_transfers))
        two.receive(source, transfer)
        source.send(two, transfer)
        assert [moved.failure for moved in two.reported()] == [None, None]
        arrived = two.executor.run(READ_B)
        torch.testing.assert_close(arrived, reference_logits(llama, IDS)[32:], atol=1e-4, rtol=0)
        two.receive(source, TransferId(next(_transfers)))  # which nobody sends
        (child,) = children() - before
        os.kill(child, signal.SIGKILL)
        with pytest.raises(ReplicaDied):
            list(map(two.executor.run, repeat(WRITE, 1000)))
        with pytest.raises(ReplicaDied):
            two.receive(source, TransferId(next(_transfers)))
        two.executor.close()
        assert children() == before
        assert two.reports.get(timeout=60).failure is Cause.CLOSED
