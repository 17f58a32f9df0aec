"""A client's request as one model reads it: checked, with its tokens and the model's sampling defaults."""

from __future__ import annotations

from reprlib import repr as shown

from quire.cluster.gateway.replica_stream import ReplicaStream
from quire.cluster.gateway.tokenizer import PromptSource
from quire.protos.quire.v1 import engine_pb2, inference_pb2
from quire.replicas.admission import check_prompt, check_sampling
from quire.replicas.errors import UnknownModel
from quire.replicas.sampling_proto import sampling_from_proto

ClientRequest = inference_pb2.GenerateRequest | inference_pb2.ChatRequest


async def submission(request: ClientRequest, stream: ReplicaStream) -> engine_pb2.Submit:
    """Return what is sent to the replica at the other end of `stream`, or to any that serves the same model.

    Raises UnknownModel, QueueFull, and InvalidRequest for what no replica of this model could answer.
    """
    check_name(request.model, stream.model)
    sampling = inference_pb2.Sampling()
    sampling.CopyFrom(stream.model.sampling)
    sampling.MergeFrom(request.sampling)
    params = sampling_from_proto(sampling)
    token_ids = await stream.tokenizer.encode(PromptSource.of(request), stream.info.max_model_tokens)
    check_prompt(token_ids, stream.info)
    check_sampling(params, stream.info, len(token_ids))
    return engine_pb2.Submit(
        token_ids=token_ids, sampling=sampling, priority=request.priority, tenant=request.tenant
    )


def check_name(name: str, model: inference_pb2.Model) -> None:
    """Raise UnknownModel unless the name is empty or this model's."""
    if name not in ("", model.name):
        raise UnknownModel(
            f"no model {shown(name)} is served here; {model.name!r} is. Leave the name empty for it"
        )
