"""The engine on a GPU: the answers of the CPU, however a step runs, and no memory asked for later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recall import mixed_prompts, recall_prompt
from scaled_models import write_scaled
from tiny_models import Chunk, make_model, reference_logits, some_tokens, step_of

from quire.replicas import LLM, GpuConfig, PoolConfig, SamplingParams, SchedulerConfig
from quire.replicas.config import EngineConfig
from quire.replicas.engine.load import load_tokenizer
from quire.replicas.model.checkpoint import find_model
from quire.replicas.runner.shard import Shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMATS = ["bf16", "fp8", "int8", "int4", "int4g32", "k8v4"]
WAYS = [
    GpuConfig(),
    GpuConfig(graphs=False),
    GpuConfig(compile=False),
    GpuConfig(compile=False, graphs=False),
]
POOL = PoolConfig(bytes=256 << 20)
TOKENIZER = load_tokenizer("demo")
RECALL = [recall_prompt(TOKENIZER, seed, distance) for distance in (100, 400, 900) for seed in range(5)]
STORIES = mixed_prompts(TOKENIZER, [5, 64, 700, 90, 2])


def answers(kv: str, device: str, gpu: GpuConfig | None = None, tp: int = 1, **scheduler: int) -> list[str]:
    """What is recalled of facts told far back: answers that the model is sure of, so that rounding a number
    between two codes the other way does not turn them.
    """
    limits = SchedulerConfig(**scheduler)
    with LLM(
        "demo", kv=kv, device=device, tp=tp, dtype="float32", gpu=gpu, pool=POOL, scheduler=limits
    ) as llm:
        done = llm.generate([prompt for prompt, _ in RECALL], SamplingParams(max_tokens=7))
        llm.check()
        assert llm.stats().pages_used == 0
    return [completion.text for completion in done]


def prompt_logprobs(kv: str, device: str, model: str = "demo") -> torch.Tensor:
    with LLM(model, kv=kv, device=device, dtype="float32", pool=POOL) as llm:
        done = llm.generate(STORIES, SamplingParams(max_tokens=1, prompt_logprobs=0))
    return torch.tensor([p.logprob for completion in done for p in completion.prompt_logprobs])


@pytest.mark.parametrize("kv", FORMATS)
def test_answers_are_those_of_the_cpu(kv):
    on_gpu = answers(kv, "cuda")
    assert on_gpu == answers(kv, "cpu")
    assert all(code in text for (_, code), text in zip(RECALL, on_gpu, strict=True))


@pytest.mark.parametrize("kv", FORMATS)
def test_every_tokens_probability_is_that_of_the_cpu(kv):
    on_gpu, on_cpu = prompt_logprobs(kv, "cuda"), prompt_logprobs(kv, "cpu")
    exact = prompt_logprobs("fp32", "cpu")
    stored = (on_cpu - exact).abs().mean()  # the format's own noise
    assert (on_gpu - on_cpu).abs().mean() < max(0.02, 0.5 * stored)  # and that of 16-bit products


@pytest.mark.parametrize("kv", FORMATS)
def test_the_magnitude_of_keys_and_values_does_not_matter(kv, tmp_path):
    factors = {"k_proj": (2.0**13, 2.0**-14), "v_proj": (2.0**-17, 2.0**13)}
    scaled = write_scaled(find_model("demo"), tmp_path / "scaled", factors)
    on_gpu, plain = prompt_logprobs(kv, "cuda", str(scaled)), prompt_logprobs(kv, "cuda")
    stored = (plain - prompt_logprobs("fp32", "cpu")).abs().mean()  # the format's own noise
    assert (on_gpu - plain).abs().mean() < max(0.02, 1.5 * stored)


@pytest.mark.parametrize("gpu", WAYS[1:], ids=lambda g: f"compile={g.compile}-graphs={g.graphs}")
def test_however_a_step_runs_the_answers_are_the_same(gpu):
    assert answers("int8", "cuda", gpu) == answers("int8", "cuda", WAYS[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_two_gpus_give_the_answers_of_one(kv):
    assert answers(kv, "cuda", tp=2) == answers(kv, "cuda")


def test_chunks_and_batches_of_any_size_give_the_same_answers():
    whole = answers("int8", "cuda")
    for limits in ({"max_step_tokens": 70, "max_running": 3}, {"max_step_tokens": 600}, {"max_running": 1}):
        assert answers("int8", "cuda", **limits) == whole


def test_facts_are_recalled_through_cached_pages():
    prompts, wanted = zip(*(recall_prompt(TOKENIZER, seed=n, distance=n) for n in (300, 900)), strict=True)
    with LLM("demo", kv="int4", device="cuda", pool=POOL) as llm:
        cold = llm.generate(list(prompts), SamplingParams(max_tokens=7))
        warm = llm.generate(list(prompts), SamplingParams(max_tokens=7))
    for completion, fact in zip([*cold, *warm], [*wanted, *wanted], strict=True):
        assert fact in completion.text
    assert all(c.usage.cached_tokens > 200 for c in warm)
    assert [c.text for c in warm] == [c.text for c in cold]


def test_requests_of_all_kinds_share_overlapped_steps():
    asked = [
        SamplingParams(max_tokens=40, temperature=0.8, seed=1, n=3),
        SamplingParams(max_tokens=30, temperature=1.0, seed=2, top_p=0.9, top_k=50),
        SamplingParams(max_tokens=30, repetition_penalty=1.2),
        SamplingParams(max_tokens=30, logprobs=3, prompt_logprobs=1, min_tokens=10),
        SamplingParams(max_tokens=50, stop=("the",)),
    ]
    pool = PoolConfig(bytes=17 * 101376)  # too few pages for all at once
    with LLM("demo", kv="int8", device="cuda", dtype="float32", pool=pool) as llm:
        prompts = mixed_prompts(TOKENIZER, [300, 200, 250, 130, 90])
        done = llm.generate(prompts, asked)
        llm.check()
        assert llm.stats().preemptions > 0
        assert llm.stats().pages_used == 0
    for completion, params in zip(done, asked, strict=True):
        assert len(completion.outputs) == params.n
        for output in completion.outputs:
            assert output.finish_reason
            assert len(output.token_ids) == params.max_tokens or output.finish_reason == "stop"
    assert len(done[3].prompt_logprobs) == 129


@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen3", "qwen3_moe"])
def test_logits_of_other_architectures_are_transformers_own(name, tmp_path):
    """Experts are routed in bf16, where they can be captured."""
    dtype = "bfloat16" if "moe" in name else "float32"
    folder, ids = make_model(name, tmp_path), some_tokens(70)
    shard = Shard(EngineConfig(model=str(folder), kv="bf16", device="cuda", dtype=dtype, pool=POOL))
    pages = list(range(3, 9))
    outs = [shard.forward(step_of([Chunk(ids[:40], 0, pages)], 64)).clone()]
    for at in range(40, 70):
        outs.append(shard.forward(step_of([Chunk(ids[at : at + 1], at, pages)], 64)).clone())
    expected = reference_logits(folder, ids)
    limit = 0.02 if dtype == "float32" else 0.08  # K and V are in bf16 anyway
    assert (torch.cat(outs).cpu() - expected).abs().mean() < limit * expected.abs().mean()


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_evicted_prefixes_come_back_from_pinned_memory_with_the_same_answers(kv):
    prompts, wanted = zip(*(recall_prompt(TOKENIZER, seed=n, distance=900) for n in range(12)), strict=True)
    page_bytes = {"int8": 101376, "int4": 55296}[kv]
    pool = PoolConfig(bytes=40 * page_bytes, host_bytes=400 * page_bytes)
    with LLM("demo", kv=kv, device="cuda", dtype="float32", pool=pool) as llm:
        rounds = [llm.generate(list(prompts), SamplingParams(max_tokens=7)) for _ in range(3)]
        llm.check()
        stats = llm.stats()
    assert stats.promoted_blocks > 100
    for cold, *warm in zip(*rounds, strict=True):
        assert [completion.text for completion in warm] == [cold.text] * 2
    assert all(fact in completion.text for fact, completion in zip(wanted, rounds[0], strict=True))


def test_a_captured_step_gives_the_same_bits_each_time_and_in_any_company():
    shard = Shard(EngineConfig(model="demo", kv="int4", device="cuda", pool=POOL))
    page_rows = np.arange(40 * 3).reshape(40, 3)
    chunks = [Chunk([5 + i] * 130, 0, page_rows[i]) for i in range(40)]
    shard.forward(step_of(chunks, 64, rows=[0]))
    step = step_of([Chunk([9 + i], 130, page_rows[i]) for i in range(40)], 64)
    first, second = shard.forward(step).clone(), shard.forward(step).clone()
    assert torch.equal(first, second)
    alone = torch.cat(
        [shard.forward(step_of([Chunk([9 + i], 130, page_rows[i])], 64)).clone() for i in (0, 7)]
    )
    assert (alone - first[[0, 7]]).abs().mean() < 0.05


def test_a_pool_that_fills_the_card_leaves_room_for_every_step():
    limits = SchedulerConfig(max_running=64)
    with LLM("demo", kv="int8", device="cuda", scheduler=limits) as llm:
        reserved = torch.cuda.memory_reserved()
        prompts = [some_tokens(4000, seed=i) for i in range(64)]
        asked = [SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, seed=i) for i in range(64)]
        done = llm.generate(prompts, asked)
        assert len(done) == 64
        assert torch.cuda.memory_reserved() - reserved < 1 << 30
        assert torch.cuda.mem_get_info()[0] > 0
