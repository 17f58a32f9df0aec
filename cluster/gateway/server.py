"""The gateway's listener: the inference service beside the standard health and reflection services."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from quire.cluster.config import GatewayConfig
from quire.cluster.gateway.grpc_service import InferenceService
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.errors import ConfigError


async def listen(service: InferenceService, config: GatewayConfig) -> tuple[grpc.aio.Server, int]:
    """Serves on config.host; returns the server and its port (config.port, or a free one for 0).

    Raises ConfigError if the address cannot be had.
    """
    name = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    server = grpc.aio.server(
        options=(
            ("grpc.so_reuseport", 0),  # or a second gateway would silently share the port
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.keepalive_time_ms", 30_000),  # a client whose machine is gone sends no FIN
            ("grpc.keepalive_timeout_ms", 10_000),
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
            f"the gateway cannot listen on {config.host}:{config.port}: the port is taken or the address is "
            "not this machine's. Change gateway.port or gateway.host, or stop what uses it"
        ) from error
    await server.start()
    for served in ("", name):
        await healths.set(served, health_pb2.HealthCheckResponse.SERVING)
    return server, port
