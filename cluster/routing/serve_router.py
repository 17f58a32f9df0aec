"""Ray Serve's request router for replicas: the request's `Route` says which of them are best.

Serve makes it in the process of whoever holds a handle, a gateway here, and runs it on a thread of its own.
It reserves a place on the first replica in order that has one; probing, backing off, draining stay Serve's.
"""

from __future__ import annotations

import logging
import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from quire.cluster.routing.book import Route

log = logging.getLogger(__name__)


class FirstTokenRouter(RequestRouter):
    """For handles that are asked with a `Route`; others get any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank. Called again, after a pause, while all are full."""
        drawn = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None:
            return [drawn[:2]]
        pending_request.routing_context.should_backoff = True
        route = pending_request.args[0] if pending_request.args else None
        if not isinstance(route, Route):
            return [drawn[:2]]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        try:
            order = route.rank({name: r.replica_metadata.get("address", "") for name, r in by_name.items()})
            return [[by_name[name]] for name in order]
        except Exception:  # whatever it is, the request can be answered anywhere
            log.exception("choosing a replica failed; taking any")
            return [drawn[:2]]
