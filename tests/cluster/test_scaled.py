"""Replicas come and go under real Ray Serve: from none, to two, to one while both have work, to none."""

import asyncio

import pytest
import ray
from ray import serve
from recall import mixed_prompts

from quire.cluster import AsyncClient, SamplingParams, collect_async
from quire.cluster.autoscaling_policy import last_record
from quire.cluster.cli.rollout import APP, served
from quire.cluster.config import parse
from quire.kvstore.peers.directory_actor import NAMESPACE
from quire.replicas.engine.load import load_tokenizer

pytestmark = pytest.mark.ray

CONFIG = {
    "engine": {
        "model": "demo",
        "threads_per_shard": 1,
        "pool": {"bytes": 16 << 20},
        "scheduler": {"max_running": 4},
    },
    "gateway": {"port": 0, "cpus": 0.1},
    "replicas": {
        "cpus_per_shard": 0.1,
        "graceful_shutdown_s": 180,  # what the longest answers take on a busy machine
        "autoscaling": {
            "min": 0,
            "max": 2,
            "occupancy": 0.8,
            "prefill_use": 10.0,  # on a busy machine one prompt may take all of a look-back
            "prefill_queue_s": 10.0,
            "first_token_s": 10.0,
            "look_back_s": 1.0,
            "report_period_s": 0.2,
            "upscale_delay_s": 0.2,
            "downscale_delay_s": 0.5,
            "downscale_to_zero_delay_s": 2.0,
        },
    },
}
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
PROMPTS = mixed_prompts(load_tokenizer("demo"), [140 + 3 * n for n in range(24)])


@pytest.fixture(scope="module")
def address(joined):
    with served(parse(CONFIG), lambda words: None) as port:
        yield f"127.0.0.1:{port}"
    with pytest.raises(ValueError, match="directory"):  # it has ended with its application
        ray.get_actor(f"{APP}-directory", namespace=NAMESPACE)


def _replicas() -> dict[str, int]:
    states = serve.status().applications[APP].deployments["Replica"].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items() if count}


async def _until(condition, within_s: float = 300.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.05)


async def test_a_request_wakes_a_replica_where_none_is_left(address):
    async with AsyncClient(address) as client:
        first = await collect_async(client.generate(PROMPTS[0], SHORT))
        await _until(lambda: _replicas() == {})
        assert (await client.stats()).replicas == []  # asking does not wake anybody
        await asyncio.sleep(1.0)
        assert _replicas() == {}
        again = await asyncio.gather(*(collect_async(client.generate(PROMPTS[0], SHORT)) for _ in range(3)))
        assert all(answer.outputs[0].token_ids == first.outputs[0].token_ids for answer in again)
        assert (await client.stats()).gateway_retries == 0


async def test_one_replica_becomes_two_and_two_become_one_while_both_have_work(address):
    async with AsyncClient(address) as client:

        async def running() -> dict[str, int]:
            return {replica.replica_id: replica.running for replica in (await client.stats()).replicas}

        async def start(prompt):
            stream = client.generate(prompt, LONG)
            await anext(stream)
            return stream

        prompts = iter(PROMPTS[1:])
        old = [await start(next(prompts)) for _ in range(4)]  # all places of the only replica
        (first,) = await running()
        await _until(lambda: _replicas() == {"RUNNING": 2})
        new = [await start(next(prompts))]
        while sum((await running()).values()) - (await running()).get(first, 0) == 0:
            new.append(await start(next(prompts)))
        for stream in [*old[1:], *new[:-1]]:  # one each is left
            await stream.aclose()
        (second,) = set(await running()) - {first}
        async with asyncio.timeout(120):
            while await running() != {first: 1, second: 1}:
                await asyncio.sleep(0.05)
        left = [asyncio.create_task(collect_async(stream)) for stream in (old[0], new[-1])]

        await _until(lambda: _replicas() == {"RUNNING": 1, "STOPPING": 1})
        assert not any(task.done() for task in left), "the requests were too short to be drained"
        await asyncio.sleep(2.0)  # until the gateway has heard
        more = [await collect_async(client.generate(next(prompts), SHORT)) for _ in range(3)]
        assert all(answer.usage.output_tokens == 2 for answer in more)
        stats = {replica.replica_id: replica for replica in (await client.stats()).replicas}
        keeper = await start(next(prompts))  # or the one that stays would soon go to sleep
        answers = await asyncio.gather(*left)
        await _until(lambda: _replicas() == {"RUNNING": 1})

        assert [answer.usage.output_tokens for answer in answers] == [LONG.max_tokens] * 2
        after = await client.stats()
        assert after.gateway_retries == 0
        (survivor,) = after.replicas
        leaver = stats[({first, second} - {survivor.replica_id}).pop()]
        assert leaver.running + leaver.requests_finished == 1, "the leaving replica was given more"
        assert survivor.fetched_blocks > 0, "nothing was handed over"
        await keeper.aclose()
        record = last_record(APP)
        assert record.target == 1
        assert any("KV occupancy" in reason for reason in record.reasons)
