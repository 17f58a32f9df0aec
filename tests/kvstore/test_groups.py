"""The store that process groups are built on."""

import psutil
import pytest
import torch
from torch._C._distributed_c10d import WorkResult

from quire.kvstore.groups import Pair, host_store

HOST = "127.0.0.1"


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
