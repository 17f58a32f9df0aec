"""Runs steps on all shards of a replica: rank 0 in this process, the others where a launcher starts them.

Notices when one of them dies or hangs, and then fails every call; it never restarts anything.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from quire.kvstore.groups import host_store
from quire.replicas.collectives import TensorParallelGroup
from quire.replicas.config import EngineConfig
from quire.replicas.errors import ReplicaDied
from quire.replicas.local_processes import LocalProcesses
from quire.replicas.model.loading import Progress
from quire.replicas.plan import StepBatch
from quire.replicas.shard import Shard, check_config
from quire.replicas.shard_process import (
    NO,
    START_TIMEOUT_S,
    YES,
    Kind,
    Loaded,
    ShardSpec,
    connect,
    use_threads,
)

_HEARTBEAT_S = 1.0
"""Idle shards hear of each other so often; a third of `shard_timeout_s` where that is less."""

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
    """A message to all ranks, with the promise of what comes of it here."""

    kind: Kind
    batch: StepBatch | None = None
    logits: Future[Tensor] = field(default_factory=Future)

    def to_bytes(self) -> bytes:
        return bytes([self.kind]) + (self.batch.to_bytes() if self.batch else b"")


class Executor:
    """The shards of one replica."""

    shard: Shard
    """Rank 0's."""

    num_pages: int
    """Pages that every shard has."""

    def __init__(
        self,
        config: EngineConfig,
        launcher: ShardLauncher | None = None,
        progress: Progress | None = None,
        *,
        host: str = "127.0.0.1",
    ) -> None:
        """Load all shards; returns when they are ready.

        `launcher`: None for processes of this machine. `host`: the address at which the others reach this
        process. Raises UnknownModel, ModelNotServable, ConfigError (of any rank), ReplicaDied.
        """
        check_config(config)  # before any process starts
        use_threads(config)
        self._launcher = launcher or LocalProcesses()
        self._failure: ReplicaDied | None = None
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if config.tp == 1:
            self.shard = Shard(config, progress=progress)
            self.num_pages = self.shard.num_pages
            return
        self._store = host_store(host, START_TIMEOUT_S)
        try:
            self._start(config, progress, host)
        except BaseException:
            for word in ("connect", "go"):
                self._store.set(word, NO)
            self._launcher.stop()
            raise

    def _start(self, config: EngineConfig, progress: Progress | None, host: str) -> None:
        specs = [
            ShardSpec(config=config, rank=r, store_host=host, store_port=self._store.port, host=host)
            for r in range(config.tp)
        ]
        for spec in specs[1:]:
            self._launcher.start(spec)
        self._await("arrived", config.tp, len)
        self._store.set("connect", YES)
        group = connect(specs[0], self._store)
        self.shard = Shard(config, 0, group, progress)
        others = self._await("loaded", config.tp, lambda data: Loaded.from_json(data).check())
        self.num_pages = min(self.shard.num_pages, *others)
        self._store.set("go", YES)
        self._thread = threading.Thread(
            target=self._serve, args=(config, group), name="quire-executor", daemon=True
        )
        self._thread.start()

    def _await(self, word: str, tp: int, read: Callable[[bytes], int]) -> list[int]:
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
        if self._thread is None:
            return self.shard.forward(batch, drawn)
        self.check()
        job = _Job(Kind.STEP, batch)
        self._jobs.put(job)
        while True:
            try:
                return job.logits.result(_POLL_S)
            except TimeoutError:
                self.check()

    def check(self) -> None:
        """Raises ReplicaDied when a shard is known to be dead or to hang."""
        if self._failure is None and self._thread and (text := self._launcher.failure()):
            self._failure = ReplicaDied(text)
        if self._failure is not None:
            raise ReplicaDied(str(self._failure))

    def close(self) -> None:
        """Stop all shards; no process is left behind. May be called twice."""
        if self._thread is None:
            return
        if self._failure is None:
            self._jobs.put(_Job(Kind.STOP))
            self._thread.join(_HEARTBEAT_S)
            self._failure = ReplicaDied("the replica is closed")
        self._launcher.stop()

    def _serve(self, config: EngineConfig, group: TensorParallelGroup) -> None:
        """The thread that talks to the group: a wait for a dead peer blocks it, and no caller."""
        use_threads(config)
        beat_s = min(_HEARTBEAT_S, config.shard_timeout_s / 3)
        kind = Kind.IDLE
        while self._failure is None and kind is not Kind.STOP:
            try:
                job = self._jobs.get(timeout=beat_s)
            except queue.Empty:
                job = _Job(Kind.IDLE)
            kind = job.kind
            self._carry_out(job, group)

    def _carry_out(self, job: _Job, group: TensorParallelGroup) -> None:
        try:
            group.send(job.to_bytes())
            if job.kind is Kind.IDLE:
                group.check_in()
            elif job.batch is not None:
                job.logits.set_result(self.shard.forward(job.batch))
        except Exception as error:  # handed to the caller in its own thread
            # Whatever it was, the ranks may no longer be at the same operation: no step can follow.
            died = isinstance(error, ReplicaDied)
            reason = self._launcher.failure() or (str(error) if died else f"a step failed: {error}")
            self._failure = self._failure or ReplicaDied(reason)
            job.logits.set_exception(self._failure if died else error)
