"""The ids of replicas and of transfers between them. Imports nothing, so that clients can name a replica."""

from __future__ import annotations

from typing import NewType

ReplicaId = NewType("ReplicaId", str)
"""One incarnation of a replica: a restarted replica has another id."""

TransferId = NewType("TransferId", int)
"""Chosen by the receiver, never used twice by it. Also the ticket of the transfer's streams."""
