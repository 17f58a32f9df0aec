"""The replica as a Ray Serve deployment: an engine, its shards in one placement group, its Engine service.

The only file of this room that knows Ray. Serve starts, checks and replaces replicas; no token passes
through it. Who deploys replicas imports this file too: the model's code is loaded where a replica or a shard
begins, for it takes seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quire.kvstore.peers.directory_actor import RayDirectory
from quire.kvstore.peers.ids import ReplicaId
from quire.replicas.config import EngineConfig, StoreConfig
from quire.replicas.engine.peer_network import GrpcPeers, peer_name
from quire.replicas.engine.service import EngineService, bind
from quire.replicas.engine.service import serve as serve_on
from quire.replicas.errors import UnknownModel
from quire.replicas.text.tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from quire.replicas.engine.async_engine import AsyncEngine
    from quire.replicas.runner.shard_process import ShardSpec

_STOP_WAIT_S = 5.0
_SERVER_GRACE_S = 1.0
_PROGRESS_KEY = b"quire/loading"

log = logging.getLogger(__name__)


class ShardActor:
    """The process of a shard of rank 1 or up."""

    def serve(self, spec: ShardSpec) -> None:
        """Returns when rank 0 says stop. Raises ReplicaDied, or what loading raises."""
        from quire.replicas.runner.shard_process import serve_shard

        serve_shard(replace(spec, host=_node_address()))


class RayShards:
    """A `ShardLauncher`: shard r is an actor in bundle r of the replica's placement group.

    The actors belong to this process: Ray ends them with it, however it ends.
    """

    def __init__(self, bundles: PlacementGroup, *, cpus: float, gpus: float) -> None:
        self._bundles = bundles
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        self._actors: list[ActorHandle[Any]] = []
        self._served: list[ray.ObjectRef[None]] = []
        self._lock = threading.Lock()
        self._failure: str | None = None

    def start(self, spec: ShardSpec) -> None:
        actor: Any = (
            ray.remote(ShardActor)
            .options(
                **self._resources,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._bundles, placement_group_bundle_index=spec.rank
                ),
            )
            .remote()
        )
        served: ray.ObjectRef[None] = actor.serve.remote(spec)
        self._actors.append(actor)
        self._served.append(served)
        served.future().add_done_callback(lambda ended: self._ended(spec.rank, ended))

    def failure(self) -> str | None:
        return self._failure

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self._served:
            ray.wait(self._served, num_returns=len(self._served), timeout=_STOP_WAIT_S)

    def _ended(self, rank: int, served: Future[None]) -> None:
        """Note that the actor's only call has returned, or that the actor has died."""
        error = served.exception()
        how = "ended" if error is None else str(error).strip().splitlines()[0]
        with self._lock:  # the first one to die is the reason; the others follow it
            self._failure = self._failure or f"shard {rank} is gone: {how}"


class Publisher(Protocol):
    """Says what an engine counts, until closed."""

    def close(self) -> None: ...


Publish = Callable[["AsyncEngine", EngineConfig], Publisher]


class Replica:
    """Options (name, placement group, health checks) are set by `cluster/app.py`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: EngineConfig,
        secret: str,
        cpus_per_shard: float,
        gpus_per_shard: float,
        publish: Publish,
    ) -> None:
        """Loads the model and listens; `publish` tells the metrics.

        Raises UnknownModel, ModelNotServable, ConfigError, ReplicaDied.
        """
        from quire.replicas.engine.async_engine import AsyncEngine

        tokenizer = await asyncio.to_thread(lambda: read_tokenizer(_folder(config.model)))
        bundles = get_current_placement_group()
        assert bundles is not None, "cluster/app.py deploys replicas in placement groups"
        launcher = RayShards(bundles, cpus=cpus_per_shard, gpus=gpus_per_shard)
        name = serve.get_replica_context().replica_id.unique_id
        self._server, self._address = bind(_node_address())
        me = peer_name(self._address)
        self._peers: GrpcPeers | None = None
        self._hand_over_s = config.store.hand_over_s
        if config.store.share:
            self._peers = await asyncio.to_thread(_peer_network, me, secret, config.store)
        self._engine = await asyncio.to_thread(
            AsyncEngine,
            config,
            launcher,
            _progress_of(name),
            host=_node_address(),
            network=self._peers,
        )
        self._service = EngineService(
            self._engine, secret=secret, replica_id=name, tokenizer=tokenizer, peer_id=me
        )
        await serve_on(self._server, self._service)
        self._metrics = publish(self._engine, config)
        log.info("replica %s answers at %s", name, self._address)

    def record_replica_metadata(self) -> dict[str, str]:
        """For gateways: where this replica's Engine service is."""
        return {"address": self._address}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve, which averages them and hands them to the autoscaling policy."""
        return asdict(self._engine.pressure())

    async def check_health(self) -> None:
        """For Serve, which replaces the replica when this raises. Never waits."""
        self._engine.check_health()

    async def __del__(self) -> None:
        """Let open requests end, then hand blocks over. Serve kills what is not done in graceful_shutdown_s.

        Serve knows of no requests here: it calls this as soon as it has taken the replica off its list.
        """
        await self._service.drain()
        if self._peers is not None:
            others = await asyncio.to_thread(self._peers.others)
            await asyncio.to_thread(self._engine.hand_over, others, self._hand_over_s)
        await asyncio.to_thread(self._metrics.close)
        await asyncio.to_thread(self._engine.close)
        if self._peers is not None:
            self._peers.close()
        await self._server.stop(_SERVER_GRACE_S)


def _folder(model: str) -> Path:
    """Raises UnknownModel, which names this node."""
    from quire.replicas.model.checkpoint import find_model

    if Path(model).is_absolute() and not Path(model).is_dir():
        raise UnknownModel(
            f"node {_node_address()} has no folder {model}; a model's folder must have the same path on "
            "every node that runs replicas"
        )
    return find_model(model)


def _peer_network(me: ReplicaId, secret: str, config: StoreConfig) -> GrpcPeers:
    app = serve.get_replica_context().app_name
    return GrpcPeers(me, secret, RayDirectory(app, max_entries=config.directory_entries))


def _node_address() -> str:
    """The address at which other nodes reach this one."""
    address: str = ray.util.get_node_ip_address()
    return address


def _progress_of(replica: str) -> Callable[[int, int], None]:
    """Return a function that publishes for `loading_progress` how much of the weights is loaded."""

    def publish(done: int, total: int) -> None:
        _internal_kv_put(_PROGRESS_KEY, f"{replica} {done} {total}".encode(), overwrite=True)

    return publish


def loading_progress() -> tuple[int, int] | None:
    """Tensors (loaded, in all) of the replica that reported last; None before the first report."""
    said = _internal_kv_get(_PROGRESS_KEY)
    if said is None:
        return None
    _, done, total = said.split()
    return int(done), int(total)
