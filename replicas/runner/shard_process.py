"""What runs where a shard of rank 1 and up lives: load, report, then do what rank 0 says until told to stop.

`serve_shard` is a plain function: a process of its own or a thread of an actor can call it.

Rank 0 and the others meet in a key-value store, whose keys are a protocol of four words:
`arrived/<rank>` the process is up → `connect`: all are → `loaded/<rank>`: how loading ended → `go`.
What orders come to goes back over it, too (`orders.py`).
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import msgspec
import torch
from torch import Tensor
from torch.distributed import Store

from quire.kvstore.peers.messages import CompletePages
from quire.kvstore.wire.groups import join_store
from quire.kvstore.wire.transport import LinkConfig
from quire.replicas.config import EngineConfig
from quire.replicas.errors import QuireError, ReplicaDied
from quire.replicas.runner.collectives import TensorParallelGroup
from quire.replicas.runner.commands import (
    Command,
    Demote,
    Idle,
    Loaded,
    MeasureKeys,
    NumberedOrder,
    Promote,
    Stop,
    decode_command,
)
from quire.replicas.runner.orders import leave_report
from quire.replicas.runner.shard import Shard, shard_device
from quire.replicas.runner.shard_store import ShardStore
from quire.replicas.step_batch import StepBatch

START_TIMEOUT_S = 3600.0
"""How long a shard waits for rank 0 to load; a dead rank 0 closes the store, which is seen at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """All that a shard's process needs to know. Picklable."""

    config: EngineConfig
    rank: int
    store_host: str
    store_port: int
    host: str
    """The address this shard binds its sockets to: its own node's."""
    links: LinkConfig | None = None
    """To other replicas' shards; None: no links."""


YES, NO = "yes", "no"
"""Rank 0's word on `connect` and `go`: on, or home because the replica does not come up."""


def use_threads(config: EngineConfig) -> None:
    """Give torch a shard's share of this machine's cores.

    For the owner of the process, in the thread that computes.
    """
    torch.set_num_threads(config.threads_per_shard or max(1, (os.cpu_count() or 1) // config.tp))


def connect(spec: ShardSpec, store: Store) -> TensorParallelGroup:
    """This rank's end of the replica's group."""
    return TensorParallelGroup(
        store,
        rank=spec.rank,
        size=spec.config.tp,
        host=spec.host,
        timeout_s=spec.config.shard_timeout_s,
        device=shard_device(spec.config, spec.rank),
    )


def serve_shard(spec: ShardSpec) -> None:
    """Be shard `spec.rank` until rank 0 says stop.

    An error while loading is reported to rank 0 and raised. Raises ReplicaDied when rank 0 sends nothing
    for `shard_timeout_s`.
    """
    use_threads(spec.config)
    device = shard_device(spec.config, spec.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current one
    try:
        store = join_store(spec.store_host, spec.store_port, START_TIMEOUT_S)
        store.set(f"arrived/{spec.rank}", "")
    except RuntimeError as error:
        raise ReplicaDied(f"shard {spec.rank} does not reach rank 0: {error}") from error
    if not _told(store, "connect"):
        return
    group = connect(spec, store)

    def all_loaded() -> None:
        store.set(f"weights/{spec.rank}", _encode(Loaded()))
        if not _told(store, "measure"):
            raise _StartEnded

    try:
        shard = Shard(spec.config, spec.rank, group, all_loaded=all_loaded)
        pages = ShardStore(shard, spec.config, spec.rank, host=spec.host, links=spec.links)
    except _StartEnded:
        return
    except QuireError as error:
        failed = Loaded(error=type(error).__name__, text=str(error))
        for word in ("weights", "loaded"):  # rank 0 waits for one of them
            store.set(f"{word}/{spec.rank}", _encode(failed))
        raise
    with closing(pages):
        store.set(f"loaded/{spec.rank}", _encode(Loaded(shard.num_pages, pages.slots, pages.endpoint)))
        if _told(store, "go"):
            _serve(shard, pages, group, store)


class _StartEnded(Exception):
    """Rank 0 gave up while this rank loaded."""


def _told(store: Store, word: str) -> bool:
    try:
        return bool(store.get(word).decode() == YES)
    except RuntimeError as error:
        raise ReplicaDied(f"rank 0 is gone before it said {word!r}: {error}") from error


def _serve(shard: Shard, pages: ShardStore, group: TensorParallelGroup, store: Store) -> None:
    while not isinstance(command := decode_command(group.receive()), Stop):
        if isinstance(command, NumberedOrder):
            pages.execute(command.order, partial(leave_report, store, command.number))
        else:
            execute(command, shard, pages, group)


def execute(command: Command, shard: Shard, pages: ShardStore, group: TensorParallelGroup) -> Tensor | None:
    """Do this rank's part of a command that is no order, and return its result, such as a step's logits."""
    match command:
        case Idle():
            group.check_in()
        case StepBatch():
            return shard.forward(command)
        case Demote(copies):
            pages.demote(copies)
        case Promote(copies):
            pages.promote(copies)
        case CompletePages():
            pages.precompute_checksums(command)
        case MeasureKeys(token_ids):
            return shard.key_moments(token_ids)
    return None


def _encode(loaded: Loaded) -> str:
    return msgspec.json.encode(loaded).decode()
