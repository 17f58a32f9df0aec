"""What an engine and a gateway refuse alike."""

from dataclasses import replace

import pytest
from serving import INFO

from quire.replicas.admission import (
    check_caller,
    check_prompt,
    check_request,
    check_sampling,
    check_token_ids,
)
from quire.replicas.errors import InvalidRequest
from quire.replicas.request import Request, RequestId, SamplingParams

SMALL = replace(INFO, vocab_size=100, max_model_tokens=8, page_tokens=16)


class _Unread(list):
    """Nobody looks at its elements."""

    def __iter__(self):
        raise AssertionError("read")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ((), "the prompt is empty"),
        ((1,) * 8, "the prompt has 8 tokens; this model serves 8"),
        ((1, 100), r"token id 100 is not in the model's vocabulary 0\.\.99"),
        ((1, -1), "token id -1 is not"),
    ],
)
def test_prompts_that_no_engine_takes(prompt, said):
    with pytest.raises(InvalidRequest, match=said):
        check_prompt(prompt, SMALL)
    with pytest.raises(InvalidRequest, match=said):
        check_request(Request(id=RequestId("x"), prompt=prompt), SMALL, pool_pages=1, has_tokenizer=True)


def test_of_what_is_too_long_no_token_is_looked_at():
    for check in (check_prompt, check_token_ids):
        with pytest.raises(InvalidRequest, match="this model serves 8"):
            check(_Unread([1]) * 9, SMALL)


def test_sampling_that_the_model_cannot_follow():
    with pytest.raises(InvalidRequest, match=r"stop_token_ids holds 100; the vocabulary is 0\.\.99"):
        check_sampling(SamplingParams(stop_token_ids=(5, 100)), SMALL, 3)
    with pytest.raises(InvalidRequest, match="prompt_logprobs of 1000000 tokens"):
        check_sampling(SamplingParams(prompt_logprobs=5), SMALL, 1_000_000)


@pytest.mark.parametrize(
    ("caller", "name"),
    [
        ((101, ""), "priority"),
        ((1.0, ""), "priority"),
        ((0, "x" * 257), "tenant"),
        ((0, None), "tenant"),
        ((0, "half of \ud83e"), "tenant"),
        ((0, "", "x" * 1_000_000), "request_id has 1000000 characters"),
    ],
)
def test_what_a_caller_says_besides(caller, name):
    with pytest.raises(InvalidRequest, match=name):
        check_caller(*caller)
