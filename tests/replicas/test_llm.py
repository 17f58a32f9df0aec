"""Offline batches through the public door."""

import pytest

from quire.replicas import LLM, SamplingParams, SchedulerConfig
from quire.replicas.errors import ConfigError, InvalidRequest, UnknownModel
from quire.replicas.request import FinishReason

CHAT = [
    {"role": "user", "content": "The pass key is 71432. The code of the river is 555."},
    {"role": "assistant", "content": "Thank you, I will remember it."},
    {"role": "user", "content": "What is the pass key?"},
]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv="int4", threads_per_shard=1) as llm:
        yield llm


def test_text_and_token_ids_are_the_same_prompt(llm):
    text = "Once upon a time there was a"
    ids = llm.tokenizer(text)["input_ids"]
    a, b = llm.generate([text, ids], SamplingParams(max_tokens=8))
    assert a.outputs == b.outputs
    assert a.prompt == tuple(ids)


def test_every_prompt_may_have_its_own_sampling(llm):
    long, short = llm.generate(
        ["The king", "The fox"], [SamplingParams(max_tokens=9), SamplingParams(max_tokens=2)]
    )
    assert len(short.outputs[0].token_ids) == 2
    assert len(long.outputs[0].token_ids) == 9
    assert short.outputs[0].finish_reason is FinishReason.LENGTH
    with pytest.raises(InvalidRequest, match="2 prompts came with 1 sampling parameters"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_one_bad_prompt_costs_nobody_anything(llm):
    before = llm.stats()
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["The king", []])
    assert llm.stats() == before


def test_more_prompts_than_may_wait_are_fed_in_turn():
    with LLM("demo", threads_per_shard=1, scheduler=SchedulerConfig(max_queued=2, max_running=2)) as llm:
        completions = llm.generate([[5, 6, i] for i in range(9)], SamplingParams(max_tokens=2))
    assert [c.prompt[-1] for c in completions] == list(range(9))


def test_two_shards_say_what_one_says():
    sampling = SamplingParams(max_tokens=16)
    with LLM("demo", kv="fp32", tp=2, threads_per_shard=1) as two:
        answer = two.chat(CHAT, sampling)
        assert two.info.tp == 2
        two.check()
    with LLM("demo", kv="fp32", threads_per_shard=1) as one:
        assert one.chat(CHAT, sampling).outputs == answer.outputs
    assert answer.text == "The pass key is 71432."


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv": "int5"}, ConfigError, "unknown KV format 'int5'; choose fp32, bf16"),
        ({"tp": 3}, ConfigError, "3"),
        ({"model": "no/such-model-anywhere"}, UnknownModel, "no/such-model-anywhere"),
        ({"max_model_tokens": 10**6}, ConfigError, "the model allows 4096"),
    ],
)
def test_impossible_options_are_refused_with_what_to_change(options, error, message):
    with pytest.raises(error, match=message):
        LLM(**({"model": "demo"} | options))
