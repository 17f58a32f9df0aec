"""Which transport a shard has: TCP for pools in a CPU's memory, NCCL for those on GPUs."""

from __future__ import annotations

import torch

from quire.kvstore.wire.nccl import NcclTransport
from quire.kvstore.wire.tcp import TcpTransport
from quire.kvstore.wire.transport import LinkConfig, Transport


def open_transport(host: str, device: torch.device, config: LinkConfig | None = None) -> Transport:
    """`host`: the address at which peers reach this process, and the only one it listens at."""
    if device.type == "cuda":
        return NcclTransport(host, device, config)
    return TcpTransport(host, config)
