"""Two replicas under Ray Serve share blocks: whoever is asked, the prompt is computed once."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray_cluster import Cluster
from recall import mixed_prompts
from served_app import Served

from quire.cluster import Client, SamplingParams, collect
from quire.replicas.engine.load import load_tokenizer

pytestmark = pytest.mark.ray

SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def pair(joined: Cluster):
    """Time is not what is tested here: a busy machine may take a while for a fetch, and none is to fail."""
    engine = {
        "tp": 1,
        "pool": {"bytes": 16 << 20},
        "store": {"lookup_timeout_s": 5.0, "fetch_timeout_s": 60.0},
    }
    with joined.application("pair", engine=engine, replicas={"count": 2}) as served:
        yield served


def test_a_prompt_that_one_replica_computed_is_fetched_by_the_other(pair: Served):
    tokenizer = load_tokenizer("demo")
    *warm_up, prompt = mixed_prompts(tokenizer, [150, 160, 170, 180, 190, 200, 900])
    others = iter(mixed_prompts(tokenizer, [800] * 5, seed=2))
    tails = mixed_prompts(tokenizer, [400] * 8, seed=1)
    with Client(pair.address) as client:

        def ask(prompt):
            return collect(client.generate(prompt, SAMPLING)).outputs[0].token_ids

        for prompt in warm_up:  # each replica learns how quickly it computes
            ask(prompt)
        while sum(replica.fetched_blocks for replica in client.stats().replicas) < 800 // 64:
            ask(prompt)  # from now on its blocks are at one of them
            time.sleep(1.0)  # and from now on the other one can know: they are announced in batches
            asked = [prompt + tail for tail in tails] * 2  # more at once than one can take soon
            with ThreadPoolExecutor(len(asked)) as pool:
                answers = list(pool.map(ask, asked))
            assert answers[: len(tails)] == answers[len(tails) :]
            prompt = next(others)
        stats = client.stats().replicas
    assert [dict(replica.fetch_failures) for replica in stats] == [{}, {}]
    received, sent = (sum(getattr(r, f"bytes_{way}") for r in stats) for way in ("received", "sent"))
    assert received == sent > 0
    assert sum(replica.bytes_saved for replica in stats) > 0.9 * received  # int8 at head size 64


@pytest.fixture(scope="module")
def split(joined: Cluster):
    with joined.application(
        "split",
        engine={"tp": 1, "pool": {"bytes": 16 << 20}},
        prefill={"count": 1, "least_tokens": 300},
    ) as served:
        yield served


def test_long_prompts_are_computed_by_a_prefill_replica_and_answered_by_another(pair: Served, split: Served):
    long, short = mixed_prompts(load_tokenizer("demo"), [700, 120])
    with Client(split.address) as client, Client(pair.address) as unsplit:
        for prompt, found in ((long, 699 // 64 * 64), (short, 0)):
            answer = collect(client.generate(prompt, SAMPLING))
            assert answer.usage.cached_tokens == found
            expected = collect(unsplit.generate(prompt, SAMPLING))
            assert answer.outputs[0].token_ids == expected.outputs[0].token_ids
        (replica,) = client.stats().replicas  # those that decode
    assert replica.fetched_blocks == 699 // 64
    assert replica.failed_fetches == 0


def test_without_its_prefill_replica_long_prompts_are_answered_all_the_same(split: Served):
    (prompt,) = mixed_prompts(load_tokenizer("demo"), [800])
    for process in split.processes("Prefill"):
        process.kill()
    with Client(split.address) as client:
        answer = collect(client.generate(prompt, SAMPLING))
    assert len(answer.outputs[0].token_ids) == 6
