"""The gateway's listener: the inference service beside the standard health and reflection services."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from quire.cluster.config import GatewayConfig
from quire.cluster.gateway.grpc_service import InferenceService
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.errors import ConfigError

_KEEPALIVE = (
    # A client whose machine is gone sends no FIN, and load balancers close idle connections after a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # no bound: a stream is idle while its request waits
    # Clients and load balancers look for dead gateways as well, up to once a second, with a call open
    # or without. Pings that come faster than this, three in a row, are an attack: "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 250),  # of those received
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.keepalive_permit_without_calls", 1),
)


@dataclass(frozen=True, slots=True)
class Listener:
    """A gateway that serves."""

    port: int
    server: grpc.aio.Server
    health: health.aio.HealthServicer

    async def stop(self, grace_s: float | None) -> None:
        """Report NOT_SERVING, then stop; open streams get `grace_s` seconds."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def check_port(host: str, port: int) -> None:
    """Raise ConfigError where the address cannot be used, in particular because another process listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"the gateway cannot listen on {host}:{port}: {error.strerror}. Choose another gateway.port "
                "(--port) or gateway.host, or stop what uses it"
            ) from error


async def listen(service: InferenceService, config: GatewayConfig, *, shared: bool = False) -> Listener:
    """Serve on config.host and config.port (0: a free one).

    `shared`: a gateway that this one replaces may still listen there. Raises ConfigError if the address
    cannot be used.
    """
    if not shared:
        check_port(config.host, config.port)
    name = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    server = grpc.aio.server(
        options=(
            ("grpc.so_reuseport", int(config.port != 0)),  # for the gateway that will replace this one
            ("grpc.max_receive_message_length", config.max_message_bytes),
            *_KEEPALIVE,
        )
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(f"{config.host}:{config.port}")
    except RuntimeError as error:
        raise ConfigError(
            f"the gateway cannot listen on {config.host}:{config.port}, which another process has taken or "
            "which is not this machine's. Change gateway.port or gateway.host, or stop what uses it"
        ) from error
    await server.start()
    for served in ("", name):
        await healths.set(served, health_pb2.HealthCheckResponse.SERVING)
    return Listener(port, server, healths)
