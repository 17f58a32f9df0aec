"""The directory as a Ray actor, one per deployment, and the way to it. The room's only file that knows Ray.

The actor has no owner and holds nothing that cannot be announced again: a replica that finds it dead makes a
new one, and the announcers fill it. Announcements are its lease: when none has come for a while, its
deployment is gone, however that ended, and it ends too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.announcer import ChannelLost
from quire.kvstore.peers.directory import Announcement, Directory, DirectoryStats, Holder
from quire.kvstore.peers.ids import ReplicaId

NAMESPACE = "quire"


class DirectoryActor:
    """`Directory`, with the actor's own clock."""

    def __init__(self, max_entries: int, silence_s: float) -> None:
        """Ends its process when nothing has been announced for twice `silence_s`."""
        self._directory = Directory(max_entries, silence_s)
        self._lease_s = 2 * silence_s
        self._heard_s = time.monotonic()
        threading.Thread(target=self._end_unheard, name="quire-directory-lease", daemon=True).start()

    def announce(self, said: Announcement) -> bool:
        self._heard_s = time.monotonic()
        return self._directory.announce(said, time.monotonic())

    def lookup(self, chain: Sequence[BlockKey]) -> tuple[Holder, ...]:
        return self._directory.lookup(chain)

    def owners(self) -> tuple[ReplicaId, ...]:
        return self._directory.owners()

    def stats(self) -> DirectoryStats:
        return self._directory.stats()

    def _end_unheard(self) -> None:
        while (left_s := self._heard_s + self._lease_s - time.monotonic()) > 0:
            time.sleep(left_s)
        os._exit(0)  # Ray ends an actor's process from inside one of its calls only, and none will come


class RayDirectory:
    """A `Channel`, and lookups. Raises ChannelLost where the actor is silent or dead: it makes another."""

    def __init__(
        self, deployment: str, *, max_entries: int, silence_s: float = 30.0, timeout_s: float = 5.0
    ) -> None:
        self._name, self._timeout_s = f"{deployment}-directory", timeout_s
        self._arguments = (max_entries, silence_s)
        self._actor = self._find()

    def announce(self, said: Announcement) -> bool:
        taken: bool = self._ask(self._actor.announce.remote(said))
        return taken

    def lookup(self, chain: Sequence[BlockKey]) -> tuple[Holder, ...]:
        holders: tuple[Holder, ...] = self._ask(self._actor.lookup.remote(chain))
        return holders

    def owners(self) -> tuple[ReplicaId, ...]:
        owners: tuple[ReplicaId, ...] = self._ask(self._actor.owners.remote())
        return owners

    def stats(self) -> DirectoryStats:
        stats: DirectoryStats = self._ask(self._actor.stats.remote())
        return stats

    def _ask(self, answer: Any) -> Any:
        try:
            return ray.get(answer, timeout=self._timeout_s)
        except RayActorError as error:
            self._actor = self._find()
            raise ChannelLost(str(error).splitlines()[0]) from error
        except GetTimeoutError as error:
            raise ChannelLost(f"the directory did not answer in {self._timeout_s:g} s") from error

    def _find(self) -> Any:
        """The deployment's actor, made if there is none. Detached: it outlives its maker."""
        actor: Any = (
            ray.remote(DirectoryActor)
            .options(
                name=self._name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=0,
            )
            .remote(*self._arguments)
        )
        return actor


def end_directory(deployment: str) -> None:
    """At once, where one knows that the deployment has ended. Does nothing if there is none."""
    try:
        ray.kill(ray.get_actor(f"{deployment}-directory", namespace=NAMESPACE))
    except ValueError:
        return
