"""Process groups built directly on a key-value store, which listens at one address and nowhere else.

torch's default group is never touched, so many groups fit in one process and a dead one leaves nothing
behind. Knows torch.distributed; not what is sent.
"""

from __future__ import annotations

import os
import re
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore


def host_store(host: str, patience_s: float) -> TCPStore:
    """The first end of a new store, at `host` and a free port. It ends with the object.

    The socket is ours because a store that opens its own listens on every address of the machine.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=patience_s),
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, patience_s: float) -> Store:
    """Another end. Its waits end after `patience_s`, or when the first end is gone, with a RuntimeError.

    While the process of the first end is stopped (SIGSTOP), every call blocks.
    """
    return TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience_s)
    )


def gloo_group(store: Store, *, rank: int, size: int, host: str, timeout_s: float) -> Any:
    """All ranks call it within `timeout_s`, or it raises RuntimeError. Its sockets are bound to `host`."""
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    return dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, options)


def nccl_group(store: Store, *, rank: int, size: int, timeout_s: float) -> Any:
    """Connects with its first operation."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)


def nccl_pair(store: Store, *, rank: int, device: torch.device, timeout_s: float) -> Any:
    """A group of two whose loss is nobody else's. Connects with its first operation, within `timeout_s`.

    It takes few of the GPU's multiprocessors, because steps run beside it.
    """
    for name, value in _LINK_SETTINGS.items():
        os.putenv(name, value)  # torch reads them here and offers no other way
    os.putenv("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(max(round(timeout_s), 1)))  # whole seconds
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _NEVER  # `Pair.wait` has deadlines of its own
    options.config.blocking = 0
    options.config.max_ctas = _LINK_CTAS
    group = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, 2, options)
    group.eager_connect_single_device(device)  # or sends would get a second communicator
    return group


_LINK_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # a lost peer would end the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # so would an abort that takes long
}
_LINK_CTAS = 8
_NEVER = timedelta(days=1)


class Pair:
    """A group of two GPUs, in which rank 0 sends and rank 1 receives. Errors raise RuntimeError."""

    def __init__(self, store: Store, *, rank: int, device: torch.device, timeout_s: float) -> None:
        """Connect: both ends construct it within `timeout_s`."""
        self._rank = rank
        self._group = nccl_pair(store, rank=rank, device=device, timeout_s=timeout_s)

    def post(self, chunk: Tensor, tag: int) -> dist.Work:
        """Begin to send `chunk`, or to receive into it: in use until `wait` or `drop` has returned."""
        move = self._group.send if self._rank == 0 else self._group.recv
        work: dist.Work = move([chunk], 1 - self._rank, tag)
        return work

    def wait(self, work: dist.Work, timeout_s: float) -> None:
        """A peer that is late raises RuntimeError, and so does one that NCCL knows to be dead."""
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


_POLL_S = 50e-6


def reason_of(error: Exception) -> str:
    """What an error says, without torch's source lines and advice."""
    return re.sub(r"\[/\S+\] |\. This is typically.*", "", str(error).splitlines()[0])
