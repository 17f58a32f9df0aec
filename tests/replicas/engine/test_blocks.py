"""Blocks that made room come back from host memory: the same answers, less to compute, books in order."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from recall import mixed_prompts

from quire.kvstore.books.host_tier import Copies
from quire.kvstore.books.keys import KeySpace, extend_chain
from quire.kvstore.peers.messages import CompletePages
from quire.replicas import LLM, EngineConfig, PoolConfig, SamplingParams, SchedulerConfig
from quire.replicas.engine.blocks import BlockStore
from quire.replicas.engine.load import load_engine, load_tokenizer
from quire.replicas.request import Output, Request, RequestId

TOKENIZER = load_tokenizer("demo")
FIRST, *OTHERS = mixed_prompts(TOKENIZER, [500, 450, 480, 420], seed=3)
PAGE_BYTES = 101376  # of the demo model in int8
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)


def engine(host_pages: int, kv: str = "int8", tp: int = 1) -> LLM:
    pool = PoolConfig(bytes=12 * PAGE_BYTES // tp, host_bytes=host_pages * PAGE_BYTES // tp)
    return LLM("demo", kv=kv, tp=tp, device="cpu", threads_per_shard=1, pool=pool)


def ask(llm: LLM, prompt: list[int]):
    (completion,) = llm.generate([prompt], GREEDY)
    llm.check()
    return completion


class Shards:
    """Who is told to copy and to sum."""

    num_pages, host_slots = 2, 2

    def __init__(self) -> None:
        self.summed: list[CompletePages] = []

    def demote(self, copies: Copies) -> None: ...
    def promote(self, copies: Copies) -> None: ...
    def precompute_checksums(self, complete: CompletePages) -> None:
        self.summed.append(complete)


def test_shards_sum_what_is_complete_and_what_came_back():
    shards, keys = Shards(), extend_chain(KeySpace(b"l", b"m", b"t").root(), list(range(32)), 16)
    blocks = BlockStore(shards, None)
    pages = blocks.pool.allocate(2)
    blocks.publish(list(zip(keys, pages, strict=True)))
    assert shards.summed == [CompletePages(tuple(pages), (1, 1))]
    blocks.pool.release(pages)
    blocks.pool.release(blocks.pool.allocate(2))  # they go to host memory
    blocks.find(SimpleNamespace(shareable_keys=lambda: keys, brought_back=False))
    back = blocks.pool.share(keys)
    assert shards.summed[1:] == [CompletePages(tuple(back), (3, 3))]


@pytest.mark.parametrize("tp", [1, 2])
def test_an_evicted_prefix_comes_back_and_gives_the_same_logits(tp):
    with engine(40, tp=tp) as llm:
        first = ask(llm, FIRST)
        for other in OTHERS:
            ask(llm, other)
        again = ask(llm, FIRST)
        stats = llm.stats()
    assert again.outputs == first.outputs
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens == (len(FIRST) - 1) // 64 * 64
    assert stats.demoted_blocks > stats.promoted_blocks >= len(FIRST) // 64 - 1
    assert stats.host_tokens == 64 * stats.promoted_blocks == stats.cached_tokens
    assert stats.host_blocks + stats.host_free == llm._executor.host_slots
    assert stats.host_blocks > 0


def test_without_host_memory_it_is_computed_again():
    with engine(0) as llm:
        first = ask(llm, FIRST)
        for other in OTHERS:
            ask(llm, other)
        again = ask(llm, FIRST)
        assert (llm.stats().demoted_blocks, llm.stats().promoted_blocks) == (0, 0)
    assert again.outputs == first.outputs
    assert again.usage.cached_tokens < (len(FIRST) - 1) // 64 * 64


def test_a_host_tier_that_is_full_keeps_what_was_used_last():
    with engine(8) as llm:
        for prompt in (FIRST, *OTHERS):
            ask(llm, prompt)
        assert ask(llm, OTHERS[-1]).usage.cached_tokens == (len(OTHERS[-1]) - 1) // 64 * 64
        assert ask(llm, FIRST).usage.cached_tokens < (len(FIRST) - 1) // 64 * 64


def test_preempted_sequences_find_their_blocks_in_host_memory():
    prompts = mixed_prompts(TOKENIZER, [200, 190, 210, 180], seed=8)
    many = SamplingParams(max_tokens=60, ignore_eos=True)
    with engine(40) as llm, engine(0) as plain:
        answers = [[c.outputs[0].token_ids for c in e.generate(prompts, many)] for e in (llm, plain)]
        llm.check()
        assert answers[0] == answers[1]
        assert llm.stats().preemptions > 0


@pytest.mark.parametrize("host_pages", [12, 16, 20])
def test_blocks_come_back_while_others_take_their_slots(host_pages):
    """Pool and host tier are both full: what makes room for a prefix may push parts of it out."""
    with engine(host_pages) as llm:
        first = [ask(llm, prompt) for prompt in (FIRST, *OTHERS)]
        again = [ask(llm, prompt) for prompt in (FIRST, *OTHERS)]
        assert llm.stats().demoted_blocks > 0
    assert [c.outputs for c in first] == [c.outputs for c in again]


@pytest.mark.parametrize("seed", [3, 8, 9])  # each found a plan that knew of fewer blocks than there were
def test_books_hold_when_sequences_that_wait_share_prefixes_that_come_and_go(seed):
    rng = random.Random(seed)
    prompts = mixed_prompts(TOKENIZER, [400, 380, 360], seed=3)
    pool = PoolConfig(bytes=rng.choice([10, 12, 14]) * PAGE_BYTES, host_bytes=400 * PAGE_BYTES)
    limits = SchedulerConfig(max_running=rng.choice([2, 4]), max_step_tokens=rng.choice([64, 128, 512]))
    config = EngineConfig(model="demo", device="cpu", threads_per_shard=1, pool=pool, scheduler=limits)
    executor, busy = load_engine(config)
    asked, ended = 0, set()
    while asked < 14 or busy.has_work:
        if asked < 14 and rng.random() < 0.4:
            asked += 1
            start = prompts[rng.randrange(3)][: rng.choice([130, 200, 260, 330, 360])]
            prompt = (*start, *(rng.randrange(200) for _ in range(rng.randrange(1, 60))))
            sampling = SamplingParams(
                max_tokens=rng.randrange(1, 40), ignore_eos=True, n=rng.choice([1, 1, 2])
            )
            busy.add(Request(id=RequestId(str(asked)), prompt=prompt, sampling=sampling))
        ended |= {e.request_id for e in busy.step() if isinstance(e, Output) and e.usage}
        busy.check()
    assert len(ended) == 14
    assert busy.stats().pages_used == 0
    executor.close()
