"""Long prompts are computed first by prefill replicas; the replicas that decode fetch the blocks.

So no decoding step waits for a long prompt. If no prefill replica can take it, the decoding replica computes
the prompt; a prompt that a prefill replica has failed at goes no further, as it may be at fault.
"""

from __future__ import annotations

from quire.cluster.api.status import error_of
from quire.cluster.gateway.replica_streams import ReplicaStreams
from quire.protos.quire.v1 import engine_pb2
from quire.replicas.errors import ReplicaDied, Status
from quire.replicas.request import ResolvedSampling
from quire.replicas.sampling_proto import sampling_to_proto

_ONE_TOKEN = sampling_to_proto(ResolvedSampling(max_tokens=1, ignore_eos=True))
"""Greedy whatever the model's defaults are, as the token is not used."""


class PrefillFirst:
    """The prefill replicas of one gateway."""

    def __init__(self, streams: ReplicaStreams, *, least_tokens: int) -> None:
        """`least_tokens`: shorter prompts are computed where they decode."""
        self._streams = streams
        self._least_tokens = least_tokens

    async def compute(self, submit: engine_pb2.Submit) -> bool:
        """Have a long prompt computed, and note in `submit` by which replica.

        Returns whether a replica died while it computed the prompt. Raises QuireError if one failed at it.
        """
        if len(submit.token_ids) < self._least_tokens:
            return False
        prompt = engine_pb2.Submit()
        prompt.CopyFrom(submit)
        prompt.sampling.CopyFrom(_ONE_TOKEN)
        try:
            async with self._streams.take(submit.token_ids, submit.tenant) as (stream, routed):
                call = stream.submit(prompt)
                routed.call = call.number
                try:
                    event = await call.next()
                    while not (event.HasField("failure") or event.delta.HasField("usage")):
                        event = await call.next()
                finally:
                    call.close()
                    self._streams.table.answered(routed)
                if not event.HasField("failure"):
                    submit.computed_by = stream.peer_id
                elif event.failure.status == Status.UNAVAILABLE:
                    await stream.report_dead()
                elif event.failure.status == Status.INTERNAL:
                    raise error_of(event.failure.status, event.failure.message)
                return event.failure.begun
        except ReplicaDied:
            return False  # none is ready

    async def close(self) -> None:
        await self._streams.close()
