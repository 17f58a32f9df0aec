import pytest

from quire.replicas.errors import InvalidRequest
from quire.replicas.request import SamplingParams
from quire.replicas.text.stopping import StopRules

RULES = StopRules(end_tokens=[2], special={2: "</s>", 3: "<|end|>"})


def test_end_tokens_are_the_models_and_the_requests():
    assert RULES.end_tokens(SamplingParams(stop_token_ids=(7,))) == {2, 7}
    assert RULES.end_tokens(SamplingParams(stop_token_ids=(7,), ignore_eos=True)) == {7}


def test_a_stop_text_that_is_a_special_token_ends_the_output_as_a_token():
    assert RULES.end_tokens(SamplingParams(stop=("<|end|>", "fox"))) == {2, 3}
    assert RULES.end_tokens(SamplingParams(stop=("</s>",), ignore_eos=True)) == {2}


def test_a_special_token_within_a_stop_text_is_refused_by_name():
    RULES.check(SamplingParams(stop=("<|end|>", "end")))
    with pytest.raises(InvalidRequest, match=r"contains the special token '<\|end\|>'"):
        RULES.check(SamplingParams(stop=("fox<|end|>",)))
