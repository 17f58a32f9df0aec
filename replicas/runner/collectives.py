"""The communicator of one replica's shards: sums, gathers, and steps from rank 0 to the others.

Built on process groups of its own (`kvstore/wire/groups.py`), so that several replicas fit in one process.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from quire.kvstore.wire.groups import gloo_group, nccl_group
from quire.kvstore.wire.stream import reason_of
from quire.replicas.errors import ReplicaDied

_FIRST_BYTES = 32 * 1024
"""A message's length and beginning travel in one operation of this many bytes: enough for a decode step."""


class TensorParallelGroup:
    """All ranks of one replica. Every method is called by all ranks, in the same order.

    Raises: ReplicaDied from every method when a rank does not take part within `timeout_s`.
    """

    def __init__(
        self, store: Store, *, rank: int, size: int, host: str, timeout_s: float, device: torch.device
    ) -> None:
        """Connect. `host` is the address this rank's sockets are bound to."""
        self.rank, self.size, self._timeout_s = rank, size, timeout_s
        try:
            self._gloo = gloo_group(store, rank=rank, size=size, host=host, timeout_s=timeout_s)
        except RuntimeError as error:
            raise self._died("connect", error) from error
        self._nccl = None
        if device.type == "cuda":
            self._nccl = nccl_group(store, rank=rank, size=size, timeout_s=timeout_s)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in x's type.

        On a CPU added in fp32 and in the order of the ranks, so that an element's sum does not depend on
        its place in a tensor of what size.
        """
        if self._nccl is not None and x.is_cuda:
            x = x.contiguous()
            self._wait(self._nccl.allreduce([x]), "all_reduce")
            return x
        parts = self.all_gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: every rank's x."""
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        if x.numel() == 0:
            return out
        if self._nccl is not None and x.is_cuda:
            self._wait(self._nccl._allgather_base(out, x), "all_gather")
        else:
            self._wait(self._gloo.allgather([list(out.unbind())], [x]), "all_gather")
        return out

    def send(self, message: bytes) -> None:
        """From rank 0 to all others, who are in `receive`."""
        whole = np.zeros(max(_FIRST_BYTES, 8 + len(message)), dtype=np.uint8)
        whole[:8] = np.frombuffer(len(message).to_bytes(8, "little"), np.uint8)
        whole[8 : 8 + len(message)] = np.frombuffer(message, np.uint8)
        self._broadcast(torch.from_numpy(whole[:_FIRST_BYTES]))
        if len(whole) > _FIRST_BYTES:
            self._broadcast(torch.from_numpy(whole[_FIRST_BYTES:]))

    def receive(self) -> bytes:
        """What rank 0 sends."""
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        self._broadcast(first)
        length = int.from_bytes(first[:8].numpy().tobytes(), "little")
        message = first[8 : 8 + length].numpy().tobytes()
        if length + 8 > _FIRST_BYTES:
            rest = torch.empty(length + 8 - _FIRST_BYTES, dtype=torch.uint8)
            self._broadcast(rest)
            message += rest.numpy().tobytes()
        return message

    def check_in(self) -> None:
        """Returns when every rank has called it: a send alone does not show that its receiver lives."""
        self.all_gather(torch.zeros(1))

    def _broadcast(self, data: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(self._gloo.broadcast([data], options), "step")

    def _wait(self, work: dist.Work, what: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._died(what, error) from error

    def _died(self, what: str, error: RuntimeError) -> ReplicaDied:
        return ReplicaDied(
            f"rank {self.rank} of {self.size} shards lost another one ({what}, limit {self._timeout_s:g} s): "
            f"{reason_of(error)}"
        )
