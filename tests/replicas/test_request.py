"""Sampling parameters as callers give them: normalised, or refused by name."""

import numpy as np
import pytest
import torch

from quire.replicas.errors import InvalidRequest
from quire.replicas.request import ResolvedSampling, SamplingParams, resolved


def test_numbers_of_numpy_and_torch_become_pythons_own():
    params = SamplingParams(
        max_tokens=np.int64(7),
        temperature=np.float32(0.5),
        top_p=torch.tensor(0.25),
        top_k=np.uint8(3),
        seed=np.int64(5),
        stop_token_ids=np.array([4, 5]),
        ignore_eos=np.bool_(True),
    )
    expected = SamplingParams(
        max_tokens=7, temperature=0.5, top_p=0.25, top_k=3, seed=5, stop_token_ids=(4, 5), ignore_eos=True
    )
    assert params == expected
    assert {type(getattr(params, name)) for name in ("max_tokens", "top_k", "seed")} == {int}
    assert {type(getattr(params, name)) for name in ("temperature", "top_p")} == {float}
    assert type(params.ignore_eos) is bool
    assert [type(token) for token in params.stop_token_ids] == [int, int]


def test_a_single_stop_text_is_one_and_none_is_none():
    assert SamplingParams(stop="The").stop == ("The",)
    assert SamplingParams(stop=["The", "end"]).stop == ("The", "end")
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_a_seed_is_any_64_bits(seed):
    assert SamplingParams(seed=seed).seed == seed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", None),
        ("max_tokens", True),
        ("max_tokens", 5.0),
        ("max_tokens", "5"),
        ("max_tokens", 2**32),
        ("min_tokens", -1),
        ("temperature", "0"),
        ("temperature", True),
        ("temperature", 1j),
        ("temperature", [0.5]),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", 1e-9),
        ("top_k", 1.5),
        ("top_k", np.True_),
        ("top_k", 1 << 40),
        ("top_p", 0),
        ("min_p", -0.1),
        ("repetition_penalty", None.__class__),
        ("presence_penalty", None),
        ("frequency_penalty", np.float64("nan")),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 2**127),
        ("seed", 1.0),
        ("stop", 5),
        ("stop", [5]),
        ("stop", {"The": 1}),
        ("stop", b"The"),
        ("stop", ["half of \ud83e"]),
        ("stop", ["x" * 257]),
        ("stop", ["x"] * 17),
        ("stop", ""),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**40]),
        ("stop_token_ids", range(65)),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("n", 0),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=rf"^{name}\b"):
        SamplingParams(**{name: value})


def test_a_refusal_does_not_repeat_a_megabyte():
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(temperature="x" * 1_000_000)
    assert len(str(refused.value)) < 200


def test_what_is_not_said_is_the_models_default_and_an_explicit_zero_is_said():
    defaults = ResolvedSampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert resolved(SamplingParams(max_tokens=3), defaults) == ResolvedSampling(
        max_tokens=3, temperature=0.7, top_p=0.9, repetition_penalty=1.1
    )
    asked = SamplingParams(temperature=0, top_k=5, repetition_penalty=1, seed=3)
    assert resolved(asked, defaults) == ResolvedSampling(temperature=0.0, top_k=5, top_p=0.9, seed=3)


def test_a_number_of_more_digits_than_python_writes_is_refused_like_any_other():
    with pytest.raises(InvalidRequest, match="max_tokens must be in"):
        SamplingParams(max_tokens=10**5000)
