"""Process groups built directly on a key-value store, which listens at one address and nowhere else.

torch's default group is never touched, several groups fit in one process and a dead one leaves nothing
behind. Knows torch.distributed; not what is sent.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
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
