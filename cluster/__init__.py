"""Serving on Ray, and the client: `from quire.cluster import Client`.

The names of the client are loaded at first use: what only runs a gateway or a replica imports none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {
    **dict.fromkeys(("Answer", "OutputText", "collect", "collect_async"), "cluster.api.answer"),
    **dict.fromkeys(("AsyncClient", "Client"), "cluster.api.client"),
    "CallOptions": "cluster.api.requests",
    "Cancelled": "cluster.api.status",
    "SamplingParams": "replicas.request",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"quire.{_HOMES.get(name, 'replicas.errors')}"), name)
