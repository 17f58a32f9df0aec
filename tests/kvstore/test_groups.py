"""The store that process groups are built on."""

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import WorkResult

from quire.kvstore.groups import GLOO_CONNECTIONS, Pair, host_store, join_store

HOST = "127.0.0.1"


def test_chunks_of_a_pair_go_over_connections_of_their_own():
    store, before = host_store(HOST, 5), established()
    cpu = torch.device("cpu")
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(
                Pair, join_store(HOST, store.port, 5), rank=rank, host=HOST, device=cpu, timeout_s=5
            )
            for rank in range(2)
        ]
        sender, receiver = (end.result() for end in ends)
    stores = 2 * 2  # two ends meet at the store, and all is in this process
    assert established() - before == stores + 2 * GLOO_CONNECTIONS
    chunks = [torch.full((1 << 20,), at, dtype=torch.uint8) for at in range(4)]
    here = [torch.zeros_like(chunk) for chunk in chunks]
    works = [(receiver.post(here[at], at), sender.post(chunks[at], at)) for at in range(4)]
    for received, sent in reversed(works):  # in any order
        receiver.wait(received, 5)
        sender.wait(sent, 5)
    assert all(map(torch.equal, here, chunks))


def established():
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process().net_connections("tcp"))


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
