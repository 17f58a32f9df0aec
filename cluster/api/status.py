"""Errors across gRPC: which status an error becomes, and which error a status becomes again."""

from __future__ import annotations

import re
from typing import Any

import grpc

from quire.replicas.errors import (
    ConfigError,
    DeadlinePassed,
    InvalidRequest,
    QueueFull,
    QuireError,
    ReplicaDied,
    Status,
    UnknownModel,
)


class Cancelled(QuireError):
    """The call was ended on purpose."""

    status = Status.CANCELLED


_ERRORS: dict[Status, type[QuireError]] = {
    error.status: error
    for error in (
        InvalidRequest,
        UnknownModel,
        QueueFull,
        DeadlinePassed,
        ReplicaDied,
        ConfigError,
        Cancelled,
    )
}


def error_of(status: str, message: str) -> QuireError:
    """Return the error with this status; QuireError itself (INTERNAL) for a status that we never send."""
    if status not in Status.__members__:
        return QuireError(f"{status}: {message}")
    return _ERRORS.get(Status(status), QuireError)(message)


FINGERPRINT_METADATA = "quire-fingerprint"
"""A key of an answer's initial metadata; its value is equal for the same model in the same formats."""
REPEATABLE_METADATA = "quire-repeatable"
"""Another key there; "1" if a retry would give the same tokens: the request is greedy or has a seed."""
RETRY_METADATA = "grpc-retry-pushback-ms"
"""A key of the trailing metadata of UNAVAILABLE: milliseconds after which a retry may succeed."""


def answer_metadata(fingerprint: str, repeatable: bool) -> tuple[tuple[str, str], ...]:
    """Return the initial metadata of an answer."""
    return ((FINGERPRINT_METADATA, fingerprint), (REPEATABLE_METADATA, str(int(repeatable))))


def retry_hint(error: QuireError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata that tells a client when to retry after this error."""
    if not isinstance(error, ReplicaDied):
        return ()
    return ((RETRY_METADATA, str(round(error.retry_s * 1000))),)


def code_of(error: QuireError) -> grpc.StatusCode:
    return grpc.StatusCode[error.status.name]


_OVERSIZED = re.compile(r"^(\w+): (?:Received|Sent) message larger than max \((\d+) vs\. (\d+)\)")
"""gRPC's own words, under RESOURCE_EXHAUSTED; a retry does not help."""
_UNREACHABLE = re.compile(r"^failed to connect to all addresses; last error: \w+: (?:ipv[46]:)?")
"""gRPC's own words, under UNAVAILABLE."""


def _too_large(where: str, size: str, most: str) -> str:
    if where == "SERVER":
        return (
            f"the request's message has {size} bytes; this gateway takes {most}. Send less, or raise "
            "gateway.max_message_bytes"
        )
    return f"a message of {size} bytes is larger than the {most} that this client takes; ask for less at once"


def error_of_rpc(error: grpc.RpcError) -> QuireError:
    """Turn a failed call back into the error that the server raised."""
    code: grpc.StatusCode = error.code()
    details = error.details() or code.name
    if code is grpc.StatusCode.CANCELLED and details == code.name:
        # A server that stops ends calls so that it has received and not begun.
        code, details = grpc.StatusCode.UNAVAILABLE, "the gateway stopped and ended the request; try again"
    if (oversized := _OVERSIZED.search(details)) is not None:
        code, details = grpc.StatusCode.INVALID_ARGUMENT, _too_large(*oversized.groups())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "the deadline passed before the answer was complete; give a longer one, or ask for less"
    raised = error_of(code.name, _UNREACHABLE.sub("no gateway answers at ", details))
    pairs: Any = error.trailing_metadata() or ()  # its stubs know pairs that cannot be taken apart
    hint = dict(pairs).get(RETRY_METADATA)
    if isinstance(raised, ReplicaDied) and hint is not None:
        raised.retry_s = int(hint) / 1000
    return raised
