"""Serving on Ray, and the client that talks to what is served: `from quire.cluster import Client`."""

from quire.cluster.api.answer import Answer, OutputText, collect, collect_async
from quire.cluster.api.client import AsyncClient, Client
from quire.cluster.api.requests import CallOptions
from quire.cluster.api.status import Cancelled
from quire.replicas.errors import (
    DeadlinePassed,
    InvalidRequest,
    QueueFull,
    QuireError,
    ReplicaDied,
    UnknownModel,
)
from quire.replicas.request import SamplingParams

__all__ = [
    "Answer",
    "AsyncClient",
    "CallOptions",
    "Cancelled",
    "Client",
    "DeadlinePassed",
    "InvalidRequest",
    "OutputText",
    "QueueFull",
    "QuireError",
    "ReplicaDied",
    "SamplingParams",
    "UnknownModel",
    "collect",
    "collect_async",
]
