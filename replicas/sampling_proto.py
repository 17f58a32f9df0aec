"""Sampling parameters as a proto and back, for clients, gateways and engines alike."""

from __future__ import annotations

from quire.protos.quire.v1 import inference_pb2
from quire.replicas.request import DEFAULTED, SamplingParams

_DEFAULTS = SamplingParams()
_PLAIN = ("min_tokens", "presence_penalty", "frequency_penalty")
_OPTIONAL = (*DEFAULTED, "max_tokens", "seed", "logprobs", "prompt_logprobs", "n")


def sampling_from_proto(message: inference_pb2.Sampling) -> SamplingParams:
    """Read sampling parameters. Raises InvalidRequest, which names the value that cannot be."""
    return SamplingParams(
        **{name: getattr(message, name) for name in _PLAIN},
        **{
            name: getattr(message, name) if message.HasField(name) else getattr(_DEFAULTS, name)
            for name in _OPTIONAL
        },
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def sampling_to_proto(sampling: SamplingParams) -> inference_pb2.Sampling:
    """Write sampling parameters; what is None stays unset."""
    return inference_pb2.Sampling(
        **{name: getattr(sampling, name) for name in (*_PLAIN, *_OPTIONAL)},
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
    )
