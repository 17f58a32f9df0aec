"""Why a transfer ended without its blocks. Each cause is counted; none ever reaches a client: the blocks are
computed instead."""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """What metrics count failures by."""

    REFUSED = "refused"  # the owner does not hold the blocks, or another layout
    BUSY = "busy"  # as many links or transfers as allowed are in use
    NO_PAGES = "no_pages"  # the receiver has no room
    PEER = "peer"  # the other side is gone or does not answer
    DEADLINE = "deadline"  # time was up
    HEADER = "header"  # another block, layout, head range or generation than was agreed
    CHECKSUM = "checksum"  # the bytes changed on the way
    LEASE = "lease"  # the owner's pages may have changed while they were read
    CLOSED = "closed"  # this side is being shut down


class TransferFailed(Exception):
    """A transfer, or a shard's part of one, ended without its blocks."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(f"{reason} ({cause})")
        self.cause = cause
