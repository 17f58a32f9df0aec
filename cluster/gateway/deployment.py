"""The gateway as a Ray Serve deployment. Serve starts and replaces it; clients come to its own port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentTargetInfo
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from quire.cluster.config import GatewayConfig, PrefillConfig
from quire.cluster.gateway.grpc_service import InferenceService
from quire.cluster.gateway.prefill import PrefillFirst
from quire.cluster.gateway.replica_streams import ReplicaStreams
from quire.cluster.gateway.server import listen
from quire.cluster.gateway.tokenizer import Tokenizers
from quire.cluster.gateway.tokenizing import Tokenizing
from quire.cluster.gateway_registry import addresses, announce, withdraw
from quire.cluster.metrics.gateway_meter import Answered, Meter
from quire.cluster.metrics.publish import Publisher
from quire.cluster.metrics.samples import gateway_samples
from quire.replicas.metric import samples_of

_STOP_S = 1.0
"""Part of the time to stop that is kept for what comes after the last request."""


class ServeReplicas:
    """Ray Serve's running replicas of one deployment, as its controller announces them to all handles."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle
        self._poll: LongPollClient | None = None

    def follow(self, listed: Callable[[Mapping[str, str]], None]) -> None:
        """See `ReplicaSource`."""

        def on_targets(targets: DeploymentTargetInfo) -> None:
            named = {
                r.replica_id.unique_id: r.replica_metadata.get("address") for r in targets.running_replicas
            }
            listed({name: address for name, address in named.items() if address})

        client, deployment = _get_global_client(), self.handle.deployment_id
        assert client is not None, "Serve runs: it has started this process"
        self._poll = LongPollClient(
            client._controller,
            {(LongPollNamespace.DEPLOYMENT_TARGETS, deployment): on_targets},  # type: ignore[dict-item]
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"quire:{deployment}",
        )

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """See `ReplicaSource`. Serve's autoscaling starts a replica for whatever waits in a handle."""
        place = asyncio.create_task(self._place())
        try:
            yield
        finally:
            place.cancel()

    async def _place(self) -> None:
        with suppress(Exception):  # the request waits for a stream, not for this
            async with self.handle.choose_replica():
                pass


class Gateway:
    """A gateway's process. Its options (name, resources) are set by `cluster/app.py`."""

    streams_of: type[ReplicaStreams] = ReplicaStreams
    """How replicas are reached and chosen."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        replicas: DeploymentHandle[Any],
        config: GatewayConfig,
        secret: str,
        prefill: DeploymentHandle[Any] | None,
        split: PrefillConfig,
        drain_s: float,
    ) -> None:
        """Start to listen. `drain_s`: the time from the beginning of its shutdown until Serve kills it.

        Raises ConfigError if the port is taken, but for a gateway of the same application that is replaced.
        """
        context = serve.get_replica_context()
        self._actor = context.replica_id.to_full_id_str()
        self._grace_s = max(drain_s - _STOP_S, 0.0)
        tokenizers = Tokenizers(Tokenizing(config.max_tokenizing_bytes))
        self._streams = self.streams_of(
            ServeReplicas(replicas), secret=secret, wait_s=config.replica_wait_s, tokenizers=tokenizers
        )
        self._prefill: PrefillFirst | None = None
        if prefill is not None:
            prefillers = self.streams_of(
                ServeReplicas(prefill), secret=secret, wait_s=split.wait_s, tokenizers=tokenizers
            )
            self._prefill = PrefillFirst(prefillers, least_tokens=split.least_tokens)
        service = InferenceService(
            self._streams,
            max_open_requests=config.max_open_requests,
            meter=Meter(self._observe),
            prefill=self._prefill,
        )
        self._metrics = Publisher(lambda: gateway_samples(service.numbers()))
        self._listener = await listen(service, config, shared=await self._replaces(context.app_name, config))
        await asyncio.to_thread(announce, self._actor, self._address(config, self._listener.port))

    async def port(self) -> int:
        """Return the port that the gateway listens on."""
        return self._listener.port

    async def _replaces(self, app: str, config: GatewayConfig) -> bool:
        """Return whether a gateway of this application, which is to be replaced, listens on the address."""
        before = await asyncio.to_thread(addresses, app)
        return self._address(config, config.port) in before

    @staticmethod
    def _address(config: GatewayConfig, port: int) -> str:
        """Return the address for clients, also on other machines."""
        host = ray.util.get_node_ip_address() if config.host in ("0.0.0.0", "::") else config.host
        return f"{host}:{port}"

    def _observe(self, answered: Answered) -> None:
        for sample in samples_of(answered):
            self._metrics.observe(sample.metric, sample.value)

    async def __del__(self) -> None:
        """Refuse new requests from now on; open ones may end as long as there is time."""
        await asyncio.to_thread(withdraw, self._actor)
        await self._listener.stop(self._grace_s)
        await asyncio.to_thread(self._metrics.close)
        await self._streams.close()
        if self._prefill is not None:
            await self._prefill.close()
