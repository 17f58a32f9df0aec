"""Runs steps on all shards of a replica: rank 0 in this process, the others where a launcher starts them.

Also has them carry out the store's orders and copies, each in its place among the steps. Notices when one of
them dies or hangs, and then fails every call; it never restarts anything.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from quire.kvstore.books.host_tier import Copies
from quire.kvstore.peers.messages import CompletePages, Moved, Order
from quire.kvstore.wire.groups import host_store
from quire.kvstore.wire.transport import Endpoint, LinkConfig
from quire.replicas.config import EngineConfig
from quire.replicas.errors import ReplicaDied
from quire.replicas.model.loading import Progress
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
    encode_command,
)
from quire.replicas.runner.local_processes import LocalProcesses
from quire.replicas.runner.orders import Reports
from quire.replicas.runner.shard import Shard, check_config
from quire.replicas.runner.shard_process import (
    NO,
    START_TIMEOUT_S,
    YES,
    ShardSpec,
    connect,
    execute,
    use_threads,
)
from quire.replicas.runner.shard_store import ShardStore
from quire.replicas.step_batch import StepBatch

Value = TypeVar("Value")

_HEARTBEAT_S = 1.0
"""How often idle shards check on each other; a third of `shard_timeout_s` where that is less."""

_POLL_S = 0.1
"""How often a waiting call asks the launcher whether all processes live."""


class ShardLauncher(Protocol):
    """Starts the shards of rank 1 and up and knows whether they live."""

    def start(self, spec: ShardSpec) -> None:
        """Have `serve_shard(spec)` called elsewhere and return at once.

        Who starts shards on other machines replaces `spec.host` by that machine's address there.
        """

    def failure(self) -> str | None:
        """Which shard is dead and why, or None. Quick: called ten times a second, from several threads."""

    def stop(self) -> None:
        """End all shards, by force if need be, and return when they are gone."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A command to all ranks, with the promise of what comes of it here."""

    command: Command
    since_s: float = field(default_factory=time.monotonic)
    result: Future[Tensor] = field(default_factory=Future)

    def now(self) -> Command:
        """The command, with what is left of an order's time: it may have waited for a step."""
        if isinstance(self.command, NumberedOrder):
            return self.command.after(time.monotonic() - self.since_s)
        return self.command


class Executor:
    """The shards of one replica."""

    shard: Shard
    """Rank 0's."""

    num_pages: int
    """Pages that every shard has."""

    host_slots: int
    """Slots of the host tier that every shard has."""

    endpoints: tuple[Endpoint, ...]
    """Where other replicas' shards meet these, by rank; none without links."""

    def __init__(
        self,
        config: EngineConfig,
        launcher: ShardLauncher | None = None,
        progress: Progress | None = None,
        *,
        host: str = "127.0.0.1",
        links: LinkConfig | None = None,
    ) -> None:
        """Load all shards; returns when they are ready.

        `launcher`: None for processes of this machine. `host`: the address at which the others reach this
        process. `links`: None where no other replica is to reach the shards, none of which then listens.
        Raises UnknownModel, ModelNotServable, ConfigError (of any rank), ReplicaDied.
        """
        check_config(config)  # before any process starts
        use_threads(config)
        self._launcher = launcher or LocalProcesses()
        self._failure: ReplicaDied | None = None
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if config.tp == 1:
            self.shard = Shard(config, progress=progress)
            self._pages = ShardStore(self.shard, config, 0, host=host, links=links)
            self._know([])
            return
        self._store = host_store(host, START_TIMEOUT_S)
        try:
            self._start(config, progress, host, links)
        except BaseException:
            for word in ("connect", "measure", "go"):
                self._store.set(word, NO)
            self._launcher.stop()
            raise

    def _start(
        self, config: EngineConfig, progress: Progress | None, host: str, links: LinkConfig | None
    ) -> None:
        port = self._store.port
        specs = [
            ShardSpec(config=config, rank=r, store_host=host, store_port=port, host=host, links=links)
            for r in range(config.tp)
        ]
        for spec in specs[1:]:
            self._launcher.start(spec)
        self._await("arrived", config.tp, len)
        self._store.set("connect", YES)
        group = connect(specs[0], self._store)
        self.shard = Shard(config, 0, group, progress, lambda: self._all_loaded(config.tp))
        with ExitStack() as unless_all_load:
            self._pages = ShardStore(self.shard, config, 0, host=host, links=links)
            unless_all_load.callback(self._pages.close)
            self._know(self._await("loaded", config.tp, _checked))
            unless_all_load.pop_all()
        self._store.set("go", YES)
        self._reports = Reports(self._store, config.tp)
        self._thread = threading.Thread(
            target=self._serve, args=(config, group), name="quire-executor", daemon=True
        )
        self._thread.start()

    def _all_loaded(self, tp: int) -> None:
        """Returns when all ranks have their weights. Raises what one of them raised."""
        self._await("weights", tp, _checked)
        self._store.set("measure", YES)

    def _know(self, others: Sequence[Loaded]) -> None:
        """What all shards have in common."""
        shards = [Loaded(self.shard.num_pages, self._pages.slots, self._pages.endpoint), *others]
        self.num_pages = min(shard.pages for shard in shards)
        self.host_slots = min(shard.slots for shard in shards)
        self.endpoints = tuple(shard.endpoint for shard in shards if shard.endpoint)

    def _await(self, word: str, tp: int, read: Callable[[bytes], Value]) -> list[Value]:
        """The store's `word/<rank>` of all ranks but 0, read. Raises ReplicaDied if one dies without it."""
        keys = [f"{word}/{rank}" for rank in range(1, tp)]
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            failure = self._launcher.failure()  # asked first: a shard leaves its word before it dies
            values = [read(self._store.get(key)) for key in keys if self._store.check([key])]
            if len(values) == len(keys):
                return values
            if failure or time.monotonic() > deadline:
                raise ReplicaDied(failure or f"a shard did not start in {START_TIMEOUT_S:g} s")
            time.sleep(_POLL_S / 4)

    @property
    def overlaps(self) -> bool:
        """Whether `run` returns while the step is still being computed: on one GPU.

        Several shards run in step with each other; only rank 0 knows what was drawn.
        """
        return self._thread is None and self.shard.device.type == "cuda"

    def run(self, batch: StepBatch, drawn: Tensor | None = None) -> Tensor:
        """Run one step on all shards: fp32 logits [R, vocabulary], good until the next step.

        `drawn`: what the step before drew, where this one overlaps it.
        Raises ReplicaDied as soon as a shard's death is known, at the latest after `shard_timeout_s`.
        """
        self.check()
        if self._thread is None:
            return self.shard.forward(batch, drawn)
        return self._result(batch)

    def _result(self, command: Command) -> Tensor:
        job = _Job(command)
        self._jobs.put(job)
        while True:
            try:
                return job.result.result(_POLL_S)
            except TimeoutError:
                self.check()

    def execute(self, order: Order, report: Callable[[Moved], None]) -> None:
        """Have every shard do its part of an order, once the steps before it are done. Needs links.

        `report` is called once for each shard by the order's deadline, from whatever thread (from this one if
        there is no link to be had) and by no shard that has died. Returns at once, or on one GPU when the
        step under way is done. Raises ReplicaDied.
        """
        if self._thread is None:
            self._pages.execute(order, report)
            return
        self.check()
        self._jobs.put(_Job(NumberedOrder(self._reports.expect(report), order)))

    def demote(self, copies: Copies) -> None:
        """Copy from the pool to the host tier on every shard: after all calls so far, before all to come.

        On several shards returns at once; that they are dead is the next step's to say.
        """
        if copies.pages and self._thread is None:
            self._pages.demote(copies)
        elif copies.pages:
            self._jobs.put(_Job(Demote(copies)))

    def promote(self, copies: Copies) -> None:
        """Copy from the host tier to the pool, likewise."""
        if copies.pages and self._thread is None:
            self._pages.promote(copies)
        elif copies.pages:
            self._jobs.put(_Job(Promote(copies)))

    def precompute_checksums(self, complete: CompletePages) -> None:
        """Have every shard begin the checksums for which other replicas will ask, where they take time."""
        if not (complete.pages and self._pages.precomputes_checksums):
            return
        if self._thread is None:
            self._pages.precompute_checksums(complete)
        else:
            self._jobs.put(_Job(complete))

    def key_moments(self, token_ids: Sequence[int]) -> Tensor:
        """Measure the keys of a text on all shards: `Shard.key_moments`. Raises ReplicaDied."""
        self.check()
        if self._thread is None:
            return self.shard.key_moments(token_ids)
        return self._result(MeasureKeys(tuple(token_ids)))

    def can_go_on(self) -> bool:
        """Whether another step can be computed, now that one has raised.

        Not once shards may be at different operations, nor after an error of the GPU itself, which stays.
        """
        if self._failure is not None:
            return False
        if self.shard.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.shard.device)
            except RuntimeError:
                return False
        return True

    def check(self) -> None:
        """Raises ReplicaDied when a shard is known to be dead or to hang, and when all are closed."""
        if self._failure is None and self._thread and (text := self._launcher.failure()):
            self._failure = ReplicaDied(text)
        if self._failure is not None:
            raise ReplicaDied(str(self._failure))

    def close(self) -> None:
        """Stop all shards, and give their memory back; no process is left behind. May be called twice.

        Transfers under way fail.
        """
        if self._thread is not None:
            if self._failure is None:
                self._jobs.put(_Job(Stop()))
                self._thread.join(_HEARTBEAT_S)
            self._launcher.stop()
            self._reports.close()
        self._failure = self._failure or ReplicaDied("the replica is closed")
        self._pages.close()
        self.shard.close()

    def _serve(self, config: EngineConfig, group: TensorParallelGroup) -> None:
        """The thread that talks to the group: a wait for a dead peer blocks it, and no caller."""
        use_threads(config)
        beat_s = min(_HEARTBEAT_S, config.shard_timeout_s / 3)
        job = _Job(Idle())
        while self._failure is None and not isinstance(job.command, Stop):
            try:
                job = self._jobs.get(timeout=beat_s)
            except queue.Empty:
                job = _Job(Idle())
            self._do(job, group)

    def _do(self, job: _Job, group: TensorParallelGroup) -> None:
        try:
            command = job.now()
            group.send(encode_command(command))
            if isinstance(command, NumberedOrder):
                self._pages.execute(command.order, partial(self._reports.deliver, command.number))
            elif (result := execute(command, self.shard, self._pages, group)) is not None:
                job.result.set_result(result)
        except Exception as error:  # handed to the caller in its own thread
            # Whatever it was, the ranks may no longer be at the same operation: no step can follow.
            died = isinstance(error, ReplicaDied)
            reason = self._launcher.failure() or (str(error) if died else f"a step failed: {error}")
            self._failure = self._failure or ReplicaDied(reason)
            job.result.set_exception(self._failure if died else error)


def _checked(data: bytes) -> Loaded:
    return msgspec.json.decode(data, type=Loaded).check()
