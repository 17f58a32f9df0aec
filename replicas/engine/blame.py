"""Decides whether an error ends one request or the engine."""

from __future__ import annotations

from quire.kvstore.books.pool import IntegrityError
from quire.replicas.errors import ReplicaDied

_MAX_IN_A_ROW = 8
"""The most requests that may fail in a row, without a token of another between them."""


class Blame:
    """The failures of one engine."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self.hopeless: Exception | None = None
        """Set once more than `_MAX_IN_A_ROW` requests have failed in a row, without a token between them."""

    def request(self, error: Exception, *, can_go_on: bool) -> str:
        """Return the error for a request that caused `error`. Raises `error` if no request caused it."""
        self.not_ours(error, can_go_on=can_go_on)
        self._in_a_row += 1
        if self._in_a_row > _MAX_IN_A_ROW:
            self.hopeless = error
        return (
            f"the engine cannot compute this request ({type(error).__name__}: {error}); the others go on. "
            "A retry would fail as well: change the request, or report what the replica's log says"
        )

    def not_ours(self, error: Exception, *, can_go_on: bool) -> None:
        """Raise errors that no request can cause: lost shards and inconsistent pools.

        `can_go_on`: whether the shards can compute another step.
        """
        if isinstance(error, ReplicaDied | IntegrityError) or not can_go_on:
            raise error

    def token_came(self) -> None:
        """Record that the engine computed a token."""
        self._in_a_row, self.hopeless = 0, None
