"""A request that is under way before its place is sure.

Serve's router ranks the replicas, then asks the best one for a place: that takes the replica a moment, longer
the busier it is, and nearly always it says yes. So the request goes to the replica it was ranked for at once.
What the replica answers waits here until the place is sure; where the place is another one, it is taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from quire.cluster.gateway.links import Call, ReplicaLink
from quire.cluster.routing.book import Route

Send = Callable[[ReplicaLink], Call | None]
"""Sends the request there; None: not before its place is sure."""


class Early:
    """One attempt of one request. All but `ranked` is called on the gateway's loop."""

    def __init__(self, send: Send, links: Mapping[str, ReplicaLink]) -> None:
        self._send, self._links = send, links
        self._loop = asyncio.get_running_loop()
        self._call: Call | None = None
        self._closed = False

    def ranked(self, route: Route, best: str, has_room: bool) -> None:
        """From any thread: which replica is best, and whether it is known to have room."""
        with suppress(RuntimeError):  # the gateway has ended
            self._loop.call_soon_threadsafe(self._go, route, best, has_room)

    def taken(self, link: ReplicaLink) -> Call | None:
        """The place is there. What was sent elsewhere is taken back."""
        if self._call is not None and self._call.link is not link:
            self._take_back()
        call, self._call = self._call, None
        self.close()
        return call

    def close(self) -> None:
        """Nothing goes out any more; what did is taken back."""
        self._closed = True
        self._take_back()

    def _go(self, route: Route, best: str, has_room: bool) -> None:
        """Serve may rank again: then it goes where it is ranked now."""
        link = self._links.get(best)
        if self._closed or (self._call is not None and self._call.link is link):
            return
        self._take_back()
        if link is not None and link.alive and has_room:
            self._call = self._send(link)
            if self._call is not None:
                route.submitted(self._call.number)

    def _take_back(self) -> None:
        if self._call is not None:
            self._call.close()
            self._call = None
