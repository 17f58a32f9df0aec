"""The group of a replica's shards: sums in a fixed order, messages of any size, silence that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quire.kvstore.wire.groups import host_store, join_store
from quire.replicas.errors import ReplicaDied
from quire.replicas.runner.collectives import TensorParallelGroup

HOST = "127.0.0.1"


class Group:
    """`size` ranks as threads."""

    def __init__(self, size: int, timeout_s: float = 20) -> None:
        self.store = host_store(HOST, 20)
        self.pool = ThreadPoolExecutor(size)
        self.ranks = list(self.pool.map(lambda r: self._join(r, size, timeout_s), range(size)))

    def _join(self, rank: int, size: int, timeout_s: float) -> TensorParallelGroup:
        store = join_store(HOST, self.store.port, 20)
        cpu = torch.device("cpu")
        return TensorParallelGroup(store, rank=rank, size=size, host=HOST, timeout_s=timeout_s, device=cpu)

    def all(self, act: Callable[[TensorParallelGroup], object]) -> list[object]:
        return list(self.pool.map(act, self.ranks))


@pytest.fixture(scope="module")
def three() -> Iterator[Group]:
    group = Group(3)
    yield group
    group.pool.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathering_keeps_the_order_of_the_ranks(three, dtype):
    parts = [torch.randn(1, 5, 7).to(dtype) for _ in range(3)]
    for got in three.all(lambda g: g.all_gather(parts[g.rank])):
        assert torch.equal(got, torch.stack(parts))


def test_nothing_gathers_to_nothing(three):
    assert [tuple(x.shape) for x in three.all(lambda g: g.all_gather(torch.empty(1, 0, 7)))] == [
        (3, 1, 0, 7)
    ] * 3


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_a_rows_sum_does_not_depend_on_the_rows_around_it(three, rows):
    parts = [torch.randn(48, 61) * 10**r for r in range(3)]
    want = (parts[0] + parts[1]) + parts[2]
    for got in three.all(lambda g: g.all_reduce(parts[g.rank][:rows])):
        assert torch.equal(got, want[:rows])


def test_bf16_is_added_in_fp32(three):
    parts = [torch.tensor([256.0]), torch.tensor([1.0]), torch.tensor([1.0])]
    for got in three.all(lambda g: g.all_reduce(parts[g.rank].bfloat16())):
        assert got.dtype == torch.bfloat16
        assert got.item() == 258  # bf16 has no 257: adding one by one would stay at 256


@pytest.mark.parametrize("length", [0, 1, 32 * 1024 - 8, 32 * 1024 - 7, 300_001])
def test_a_message_of_any_length_arrives(three, length):
    message = bytes(i * 7 % 251 for i in range(length))
    got = three.all(lambda g: g.send(message) if g.rank == 0 else g.receive())
    assert got == [None, message, message]


def test_a_silent_rank_is_noticed_by_all_within_the_limit():
    group, quiet = Group(2, timeout_s=0.5), threading.Event()

    def act(g: TensorParallelGroup) -> object:
        if g.rank == 1:
            return quiet.wait(20)
        with pytest.raises(
            ReplicaDied, match=r"rank 0 of 2 shards lost another one \(all_gather, limit 0.5 s\)"
        ):
            g.check_in()
        quiet.set()
        return None

    assert group.all(act) == [None, True]
    with pytest.raises(ReplicaDied, match=r"rank 1 of 2 .* \(step"):
        group.ranks[1].receive()
    group.pool.shutdown()


def test_a_rank_that_never_comes_is_noticed():
    store = host_store(HOST, 20)
    with pytest.raises(ReplicaDied, match=r"\(connect, limit 0.3 s\)"):
        TensorParallelGroup(store, rank=0, size=2, host=HOST, timeout_s=0.3, device=torch.device("cpu"))
