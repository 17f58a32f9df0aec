"""Where gateways listen: each registers in Ray's key-value store; look-ups return those that are alive."""

from __future__ import annotations

import ray
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

_PREFIX = "quire/gateway/"


def announce(actor: str, address: str) -> None:
    """Register a gateway's address. `actor`: the name that Serve gave the gateway's actor."""
    _internal_kv_put((_PREFIX + actor).encode(), address.encode(), overwrite=True)


def withdraw(actor: str) -> None:
    """Remove a gateway that does not listen any more."""
    _internal_kv_del((_PREFIX + actor).encode())


def addresses(app: str) -> list[str]:
    """Return host:port of the application's gateways."""
    return sorted(by_actor(app).values())


def by_actor(app: str) -> dict[str, str]:
    """Return addresses by the actors' names, and remove entries of gateways that were killed."""
    living = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    found = {}
    for key in _internal_kv_list(_PREFIX.encode()):
        actor = key.decode().removeprefix(_PREFIX)
        if actor not in living:
            withdraw(actor)
        elif f"::{app}#" in actor and (address := _internal_kv_get(key)) is not None:
            found[actor] = address.decode()
    return found
