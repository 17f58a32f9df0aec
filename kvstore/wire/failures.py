"""Why transfers fail. Causes are counted and never reach a client, because the blocks are recomputed."""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """The label by which metrics count failures."""

    REFUSED = "refused"  # the owner does not have the blocks, or has another layout
    BUSY = "busy"  # all allowed links or transfers are in use
    NO_PAGES = "no_pages"  # the receiver has too few pages
    PEER = "peer"  # the other side is gone or does not answer
    DEADLINE = "deadline"  # the deadline passed
    HEADER = "header"  # not the agreed block, layout, head range or generation
    CHECKSUM = "checksum"  # the bytes changed in transit
    LEASE = "lease"  # the owner's pages may have changed while they were read
    CLOSED = "closed"  # this side is shutting down


class TransferFailed(Exception):
    """A transfer, or a shard's part of one, ended without its blocks."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(f"{reason} ({cause})")
        self.cause = cause
