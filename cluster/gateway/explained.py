"""A routing decision as clients see it."""

from __future__ import annotations

from quire.cluster.routing.book import Decision
from quire.protos.quire.v1 import inference_pb2


def explained(decision: Decision) -> inference_pb2.Routing:
    """Where nothing was predicted, no prediction is set."""
    said = inference_pb2.Routing(
        replica_id=decision.replica_id,
        reason=decision.reason.value,
        candidates=decision.candidates,
        scoring_us=decision.scoring_s * 1e6,
    )
    if (predicted := decision.predicted) is not None:
        said.predicted_first_token_s = predicted.first_token_s
        said.expected_cached_tokens = predicted.cached_tokens
        said.expected_fetched_tokens = predicted.fetched_tokens
        said.wait_s = predicted.wait_s + predicted.pressure_s
        said.work_s = predicted.work_s
    return said
