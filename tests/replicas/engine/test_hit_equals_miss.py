"""One request, one answer: cold, from cached blocks, chunked anyhow, alone, in company, or preempted.

Tokens and log-probabilities are compared for equality, without a tolerance. On a CPU that holds because
nothing a token's arithmetic consists of depends on the other tokens of its step: steps are padded to row
counts for which the matrix products are row-invariant (`replicas/model/invariance.py`), the attention
kernel treats every query row in one fixed order (`kernels/cpu.cpp`), and a prompt attends to the same
quantized pages that a cache hit finds.
"""

import random

import pytest
from recall import mixed_prompts

from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout
from quire.replicas.config import PoolConfig, SchedulerConfig
from quire.replicas.llm import LLM, Completion
from quire.replicas.request import SamplingParams

FORMATS = ["fp32", "bf16", "fp8", "int8", "int4", "k8v4", "int4g32"]
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, top_p=0.95, seed=11, logprobs=3)
PROMPT_TOKENS = 139


def _llm(kv: str, max_step_tokens: int = 512, pages: int | None = None) -> LLM:
    scheduler = SchedulerConfig(max_step_tokens=max_step_tokens, max_running=min(32, max_step_tokens))
    size = None if pages is None else pages * PageLayout(layer_formats(kv, 6), 2, 64).page_bytes
    return LLM("demo", kv=kv, scheduler=scheduler, pool=PoolConfig(bytes=size), threads_per_shard=1)


def _answer(completion: Completion) -> tuple[object, ...]:
    output = completion.outputs[0]
    return output.token_ids, output.logprobs, output.text


@pytest.fixture(scope="module", params=FORMATS)
def cold(request):
    """The format, the prompt, 31 others, and the answer of an engine that did nothing else before."""
    with _llm(request.param) as llm:
        rng = random.Random(5)
        prompt, *others = mixed_prompts(
            llm.tokenizer, [PROMPT_TOKENS, *(rng.randint(3, 180) for _ in range(31))], seed=3
        )
        completion = llm.generate([prompt], SAMPLING)[0]
        assert completion.usage.cached_tokens == 0
        yield request.param, llm, prompt, others, _answer(completion)


def test_from_cached_blocks(cold):
    _, llm, prompt, _, answer = cold
    again = llm.generate([prompt], SAMPLING)[0]
    assert again.usage.cached_tokens == PROMPT_TOKENS // 64 * 64
    assert _answer(again) == answer


def test_another_tenant_shares_nothing_and_gets_the_same(cold):
    _, llm, prompt, _, answer = cold
    other = llm.generate([prompt], SAMPLING, tenant="other")[0]
    assert other.usage.cached_tokens == 0
    assert _answer(other) == answer


def test_among_31_others(cold):
    _, llm, prompt, others, answer = cold
    everybody = [*others[:13], prompt, *others[13:]]
    completions = llm.generate(everybody, SAMPLING, tenant="crowd")
    assert _answer(completions[13]) == answer


@pytest.mark.parametrize("max_step_tokens", [1, 7, 64, 100])
def test_chunked_at_any_size(cold, max_step_tokens):
    kv, _, prompt, _, answer = cold
    with _llm(kv, max_step_tokens) as llm:
        assert _answer(llm.generate([prompt], SAMPLING)[0]) == answer


def test_preempted_and_computed_again(cold):
    kv, _, prompt, others, answer = cold
    with _llm(kv, pages=8) as llm:
        company = [others[0], prompt, *others[1:4]]
        long = SamplingParams(max_tokens=60, ignore_eos=True)
        params = [long, SAMPLING, *[long] * 3]
        completions = llm.generate(company, params)
        assert _answer(completions[1]) == answer
        assert llm.stats().preemptions > 0
        llm.check()
