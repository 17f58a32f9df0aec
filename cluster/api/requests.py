"""What a client sends: requests made of prompts, messages, sampling parameters and options.

All that can be refused without asking a gateway is refused here, as InvalidRequest. Knows no channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.protos.quire.v1 import inference_pb2
from quire.replicas import values
from quire.replicas.errors import InvalidRequest
from quire.replicas.request import MAX_NAME_CHARACTERS, MAX_PRIORITY, SamplingParams
from quire.replicas.sampling_proto import sampling_to_proto
from quire.replicas.text.prompt import Messages, Prompt, as_messages, as_prompt

StreamRequest = inference_pb2.GenerateRequest | inference_pb2.ChatRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What a request may carry besides its prompt and its sampling."""

    deadline_s: float | None = None
    """Seconds from now until the request ends with DeadlinePassed; None: no deadline."""
    request_id: str = ""
    """An id that is unique among the open requests; needed to `cancel` from elsewhere."""
    priority: int = 0
    """-100..100; requests with a higher one go first."""
    tenant: str = ""
    """Cached blocks are shared between requests of one tenant only."""
    model: str = ""
    """The name of the model; empty: the one that is served."""
    explain_routing: bool = False
    """Ask for the reason why a replica was chosen, in the last delta."""

    def __post_init__(self) -> None:
        """Check every option. Raises InvalidRequest, which names it."""
        if self.deadline_s is not None:
            object.__setattr__(self, "deadline_s", _deadline(self.deadline_s))
        priority = values.whole("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        object.__setattr__(self, "priority", priority)
        for name in ("request_id", "tenant"):
            values.text(name, getattr(self, name), MAX_NAME_CHARACTERS)
        values.text("model", self.model, _MAX_MODEL_CHARACTERS)
        object.__setattr__(self, "explain_routing", values.flag("explain_routing", self.explain_routing))


_MAX_MODEL_CHARACTERS = 4096
_MAX_DEADLINE_S = 10 * 365 * 86_400.0
"""Ten years: gRPC cannot count much further."""


def _deadline(value: object) -> float:
    deadline_s = values.finite("deadline_s", value)
    if not 0 < deadline_s <= _MAX_DEADLINE_S:
        raise InvalidRequest(
            f"deadline_s must be a positive number of seconds, {_MAX_DEADLINE_S:g} at most, got "
            f"{deadline_s:g}; None: no deadline"
        )
    return deadline_s


def generate_request(
    prompt: Prompt, sampling: SamplingParams | None, options: CallOptions
) -> inference_pb2.GenerateRequest:
    """Build the message of Generate. Raises InvalidRequest for what is no prompt."""
    request = inference_pb2.GenerateRequest(**_common(sampling, options))
    given = as_prompt(prompt)
    if isinstance(given, str):
        request.text = given
    else:
        request.token_ids.ids.extend(given)
        request.token_ids.SetInParent()
    return request


def chat_request(
    messages: Messages, sampling: SamplingParams | None, options: CallOptions
) -> inference_pb2.ChatRequest:
    """Build the message of Chat. Raises InvalidRequest for what are no messages."""
    return inference_pb2.ChatRequest(messages=_turns(messages), **_common(sampling, options))


def cancel_request(request_id: str) -> inference_pb2.CancelRequest:
    """Build the message of Cancel. Raises InvalidRequest for what cannot be the id of a request."""
    return inference_pb2.CancelRequest(request_id=values.text("request_id", request_id, MAX_NAME_CHARACTERS))


def tokenize_request(text: str, messages: Messages) -> inference_pb2.TokenizeRequest:
    """Build the message of Tokenize. Raises InvalidRequest for what is no text or are no messages."""
    return inference_pb2.TokenizeRequest(text=values.text("text", text), messages=_turns(messages))


def detokenize_request(token_ids: Sequence[int]) -> inference_pb2.DetokenizeRequest:
    """Build the message of Detokenize. Raises InvalidRequest for what are no token ids."""
    return inference_pb2.DetokenizeRequest(token_ids=values.token_ids("token_ids", token_ids))


def _turns(messages: Messages) -> list[inference_pb2.ChatMessage]:
    turns = as_messages(messages)
    return [inference_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in turns]


def _common(sampling: SamplingParams | None, options: CallOptions) -> dict[str, Any]:
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise InvalidRequest(f"sampling must be SamplingParams, got {values.shown(sampling)}")
    if not isinstance(options, CallOptions):
        raise InvalidRequest(f"options must be CallOptions, got {values.shown(options)}")
    return {
        "model": options.model,
        "sampling": sampling_to_proto(sampling or SamplingParams()),
        "request_id": options.request_id,
        "priority": options.priority,
        "tenant": options.tenant,
        "explain_routing": options.explain_routing,
    }
