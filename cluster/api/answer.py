"""An answer put together from its deltas."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from dataclasses import dataclass, field

from quire.protos.quire.v1 import inference_pb2


@dataclass(slots=True)
class OutputText:
    """One of the n outputs of a request, as far as it has arrived."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprob] = field(default_factory=list)
    finish_reason: inference_pb2.FinishReason = inference_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(slots=True)
class Answer:
    """All deltas of a request put together."""

    outputs: dict[int, OutputText] = field(default_factory=dict)
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    timings: inference_pb2.Timings = field(default_factory=inference_pb2.Timings)
    prompt_logprobs: list[inference_pb2.TokenLogprob] = field(default_factory=list)
    routing: inference_pb2.Routing | None = None
    """Why this replica was chosen; set if `explain_routing` asked for it."""

    @property
    def text(self) -> str:
        """The text of the first output."""
        return self.outputs[0].text

    def add(self, delta: inference_pb2.Delta) -> None:
        """Append what a delta brings to the output that it belongs to."""
        output = self.outputs.setdefault(delta.index, OutputText())
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        output.logprobs.extend(delta.logprobs)
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        output.finish_reason = delta.finish_reason or output.finish_reason
        if delta.HasField("usage"):
            self.usage, self.timings = delta.usage, delta.timings
            self.routing = delta.routing if delta.HasField("routing") else None


def collect(deltas: Iterable[inference_pb2.Delta]) -> Answer:
    """Wait for the end of a stream of `Client` and return the whole answer."""
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
    return answer


async def collect_async(deltas: AsyncIterable[inference_pb2.Delta]) -> Answer:
    """Wait for the end of a stream of `AsyncClient` and return the whole answer."""
    answer = Answer()
    async for delta in deltas:
        answer.add(delta)
    return answer
