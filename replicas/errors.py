"""Errors of requests and at start, each with its gRPC status.

QuireError
├── InvalidRequest      INVALID_ARGUMENT     the request can never be served as it is
├── UnknownModel        NOT_FOUND            no such model, file or hub id
├── QueueFull           RESOURCE_EXHAUSTED   retry later
├── DeadlinePassed      DEADLINE_EXCEEDED    the client's deadline has passed
├── ReplicaDied         UNAVAILABLE          a shard is gone; a retry may succeed
├── ConfigError         FAILED_PRECONDITION  the configuration contradicts itself or the model
└── ModelNotServable    FAILED_PRECONDITION  an architecture or checkpoint we refuse, with the reason
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Status(StrEnum):
    """The gRPC status codes we use, by name; `cluster` maps them to grpc.StatusCode."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    UNAVAILABLE = "UNAVAILABLE"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    INTERNAL = "INTERNAL"


class QuireError(Exception):
    """The base of all errors whose message is meant for the user."""

    status: ClassVar[Status] = Status.INTERNAL


class InvalidRequest(QuireError):
    status = Status.INVALID_ARGUMENT


class UnknownModel(QuireError):
    status = Status.NOT_FOUND


class QueueFull(QuireError):
    status = Status.RESOURCE_EXHAUSTED


class DeadlinePassed(QuireError):
    status = Status.DEADLINE_EXCEEDED


class ReplicaDied(QuireError):
    status = Status.UNAVAILABLE
    retry_s = 0.5
    """Seconds after which a retry may succeed."""


class ConfigError(QuireError):
    status = Status.FAILED_PRECONDITION


class ModelNotServable(QuireError):
    status = Status.FAILED_PRECONDITION
