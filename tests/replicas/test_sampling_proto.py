from dataclasses import fields

import pytest

from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import InvalidRequest
from quire.replicas.request import SamplingParams
from quire.replicas.sampling_proto import sampling_from_proto, sampling_to_proto

ODD = SamplingParams(
    max_tokens=7,
    min_tokens=3,
    temperature=0.7,
    top_k=11,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=-0.3,
    frequency_penalty=0.2,
    seed=0,
    stop=("a", "bc"),
    stop_token_ids=(4, 5),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=2,
    n=3,
)


@pytest.mark.parametrize("sampling", [SamplingParams(), ODD])
def test_sampling_survives_the_way_there_and_back(sampling):
    data = sampling_to_proto(sampling).SerializeToString()
    assert sampling_from_proto(inference_pb2.Sampling.FromString(data)) == sampling


def test_every_sampling_parameter_has_a_field():
    assert {f.name for f in fields(SamplingParams)} == set(inference_pb2.Sampling.DESCRIPTOR.fields_by_name)
    assert all(getattr(ODD, f.name) != f.default for f in fields(ODD)), "the round trip must see each"


def test_an_unset_sampling_is_the_default_and_an_impossible_one_is_refused():
    assert sampling_from_proto(inference_pb2.Sampling()) == SamplingParams()
    with pytest.raises(InvalidRequest, match="max_tokens"):
        sampling_from_proto(inference_pb2.Sampling(max_tokens=0))


def test_an_explicit_zero_is_not_the_same_as_nothing():
    zeros = SamplingParams(temperature=0, top_k=0, min_p=0)
    data = sampling_to_proto(zeros).SerializeToString()
    assert sampling_from_proto(inference_pb2.Sampling.FromString(data)) == zeros
    assert zeros != SamplingParams()
