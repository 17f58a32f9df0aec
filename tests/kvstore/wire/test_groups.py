"""The store that process groups are built on."""

import psutil
import pytest
import torch
import torch.distributed as dist

from quire.kvstore.wire.groups import Pair, host_store

HOST = "127.0.0.1"
SUCCESS, COMM_ERROR = 0, 2
"""Of torch's WorkResult, which torch.distributed does not export."""


class Completed:
    """What NCCL says of an operation that it has done, or given up; `result`: None, not written down yet."""

    def __init__(self, result):
        self._result = torch.futures.Future()
        if result is not None:
            self._result.set_result(result)

    def is_completed(self):
        return True

    def get_future_result(self):
        return self._result


def test_torch_tells_how_operations_ended():
    assert callable(dist.Work.get_future_result)


@pytest.fixture
def nccl():
    return Pair.__new__(Pair)  # there may be no GPU


def test_an_operation_that_nccl_gave_up_is_completed_too_and_is_an_error(nccl):
    with pytest.raises(RuntimeError, match="lost the other end"):
        nccl.wait(Completed(COMM_ERROR), 1)


@pytest.mark.parametrize("result", [SUCCESS, None])
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
