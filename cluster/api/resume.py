"""An answer that resumes where another one stopped: only what is new is passed on, and the rest must agree.

Used by gateways when a replica dies, and by clients when a gateway does.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import ReplicaDied


class Differs(ReplicaDied):
    """The answer that was sent in part cannot be resumed by the replicas there are."""


def repeatable(sampling: inference_pb2.Sampling) -> bool:
    """Return whether the same model would draw the same tokens again; they are compared all the same.

    `sampling` must have the model's defaults filled in.
    """
    return sampling.temperature == 0 or sampling.HasField("seed")


@dataclass(slots=True)
class _Output:
    token_ids: list[int] = field(default_factory=list)
    characters: int = 0


class Delivered:
    """The part of an answer that the client has received."""

    def __init__(self) -> None:
        self._outputs: defaultdict[int, _Output] = defaultdict(_Output)
        self._fingerprint: str | None = None

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def from_model(self, fingerprint: str) -> None:
        """Take the model of what comes next. Raises Differs if another one began the answer."""
        if self and fingerprint != self._fingerprint:
            raise Differs("the answer was cut off, and another model has taken its place; try again")
        self._fingerprint = fingerprint

    def add(self, delta: inference_pb2.Delta) -> None:
        output = self._outputs[delta.index]
        output.token_ids.extend(delta.token_ids)
        output.characters += len(delta.text)

    def again(self) -> Repeated:
        """Return what finds the new part of another answer to the same request."""
        return Repeated({at: _Output(list(o.token_ids), o.characters) for at, o in self._outputs.items()})


class Repeated:
    """Finds what is new in an answer that begins once more."""

    def __init__(self, known: dict[int, _Output]) -> None:
        self._known = known

    def rest(self, delta: inference_pb2.Delta) -> inference_pb2.Delta | None:
        """Return what is new in a delta, or None. Raises Differs if its tokens are not those sent before."""
        output = self._known.get(delta.index)
        if output is None:
            return delta
        known = min(len(output.token_ids), len(delta.token_ids))
        if list(delta.token_ids[:known]) != output.token_ids[:known]:
            raise Differs("the answer was cut off, and another one differs from what was sent; try again")
        del output.token_ids[:known]
        if delta.finish_reason and output.token_ids:
            raise Differs("the answer was cut off, and another one ends before what was sent; try again")
        characters = min(output.characters, len(delta.text))
        output.characters -= characters
        rest = inference_pb2.Delta()
        rest.CopyFrom(delta)
        rest.text = delta.text[characters:]
        del rest.token_ids[:known], rest.logprobs[:known]
        rest.ClearField("prompt_logprobs")
        new = rest.token_ids or rest.text or rest.finish_reason or rest.HasField("usage")
        return rest if new else None
