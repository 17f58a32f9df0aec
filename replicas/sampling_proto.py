"""Sampling parameters as a proto and back, for clients, gateways and engines: fields have the same names."""

from __future__ import annotations

from dataclasses import fields

from quire.protos.quire.v1 import inference_pb2
from quire.replicas.request import SamplingParams


def sampling_from_proto(message: inference_pb2.Sampling) -> SamplingParams:
    """Read sampling parameters; what the message leaves unset has its default.

    Raises InvalidRequest, which names the value that is refused.
    """
    return SamplingParams(**{field.name: value for field, value in message.ListFields()})


def sampling_to_proto(sampling: SamplingParams) -> inference_pb2.Sampling:
    """Write sampling parameters; what is None stays unset."""
    return inference_pb2.Sampling(**{f.name: getattr(sampling, f.name) for f in fields(sampling)})
