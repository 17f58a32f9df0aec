"""Whose fault an error is: one request's, which ends, or the engine's own, which ends the engine."""

from __future__ import annotations

from quire.kvstore.books.pool import IntegrityError
from quire.replicas.errors import ReplicaDied

_MOST = 8
"""Requests that may fail one after the other, with no token of another between them."""


class Blame:
    """Of one engine."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self.hopeless: Exception | None = None
        """Set once more than `_MOST` requests have failed one after the other, with no token between them."""

    def request(self, error: Exception, *, can_go_on: bool) -> str:
        """What to tell a request that an error is the fault of. Raises the error if it is not."""
        self.not_ours(error, can_go_on=can_go_on)
        self._in_a_row += 1
        if self._in_a_row > _MOST:
            self.hopeless = error
        return (
            f"the engine cannot compute this request ({type(error).__name__}: {error}); the others go on. "
            "Another try would end like this one: change the request, or report what the replica's log says"
        )

    def not_ours(self, error: Exception, *, can_go_on: bool) -> None:
        """Raise what cannot be a request's fault: lost shards, and books that contradict themselves.

        `can_go_on`: whether the shards can compute another step.
        """
        if isinstance(error, ReplicaDied | IntegrityError) or not can_go_on:
            raise error

    def token_came(self) -> None:
        """The engine computes."""
        self._in_a_row, self.hopeless = 0, None
