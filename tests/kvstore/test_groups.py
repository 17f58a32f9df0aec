"""The store that process groups are built on."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import WorkResult

from quire.kvstore.groups import Pair, host_store, join_store

HOST = "127.0.0.1"


def test_nothing_arrives_that_was_stopped():
    store, cpu = host_store(HOST, 5), torch.device("cpu")
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(
                Pair, join_store(HOST, store.port, 5), rank=rank, host=HOST, device=cpu, timeout_s=5
            )
            for rank in range(2)
        ]
        sender, receiver = (end.result() for end in ends)
    here = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(3)]
    works = [receiver.post(chunk, at) for at, chunk in enumerate(here)]
    sent = sender.post(torch.ones_like(here[0]), 0)
    receiver.wait(works[0], 5)
    sender.wait(sent, 5)
    receiver.stop(works[1:])
    for at in (1, 2):
        with suppress(RuntimeError):  # sooner or later it notices
            sender.wait(sender.post(torch.ones_like(here[at]), at), 1)
    assert [int(chunk.sum()) for chunk in here] == [1 << 20, 0, 0]


class Completed:
    """What NCCL says of an operation that it has done, or given up; `result`: None, not written down yet."""

    def __init__(self, result):
        self._result = torch.futures.Future()
        if result is not None:
            self._result.set_result(int(result))

    def is_completed(self):
        return True

    def get_future_result(self):
        return self._result


def test_torch_tells_how_operations_ended():
    assert callable(dist.Work.get_future_result)


@pytest.fixture
def nccl():
    pair = Pair.__new__(Pair)  # there may be no GPU
    pair._cuda = True
    return pair


def test_an_operation_that_nccl_gave_up_is_completed_too_and_is_an_error(nccl):
    with pytest.raises(RuntimeError, match="lost the other end"):
        nccl.wait(Completed(WorkResult.COMM_ERROR), 1)


@pytest.mark.parametrize("result", [WorkResult.SUCCESS, None])
def test_one_that_was_done_is_none(nccl, result):
    nccl.wait(Completed(result), 1)


def test_the_store_listens_nowhere_but_at_its_host():
    store = host_store(HOST, 5)
    at = {
        c.laddr.ip
        for c in psutil.Process().net_connections()
        if c.status == "LISTEN" and c.laddr.port == store.port
    }
    assert at == {HOST}
