"""Shards of rank 1 and up in this process, where tests can look at them."""

from __future__ import annotations

import threading

from quire.replicas.errors import QuireError
from quire.replicas.runner.shard_process import ShardSpec, serve_shard


class Threads:
    """A launcher whose shards are threads of this process, as an actor would hold them."""

    def __init__(self, change=lambda spec: spec) -> None:
        self._change = change
        self._shards: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.stopped = False

    def start(self, spec: ShardSpec) -> None:
        shard = threading.Thread(target=self._serve, args=(self._change(spec),), daemon=True)
        self._shards.append(shard)
        shard.start()

    def _serve(self, spec: ShardSpec) -> None:
        try:
            serve_shard(spec)
        except (QuireError, IndexError) as error:
            self.errors.append(error)

    def failure(self) -> str | None:
        dead = [i + 1 for i, shard in enumerate(self._shards) if not shard.is_alive()]
        return f"shards {dead} ended" if dead else None

    def stop(self) -> None:
        self.stopped = True
        for shard in self._shards:
            shard.join(10)
