"""Three replicas under Ray Serve: prefixes find their replica, and a replica that dies is done without."""

import asyncio
import random
import time

import pytest
from ray_cluster import Cluster
from served_app import Served

from quire.cluster import AsyncClient, CallOptions, Client, SamplingParams, collect, collect_async

pytestmark = pytest.mark.ray

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True)
EXPLAIN = CallOptions(explain_routing=True)


@pytest.fixture(scope="module")
def three(joined: Cluster):
    engine = {"tp": 1, "store": {"share": False}}
    with joined.application("three", engine=engine, replicas={"count": 3}) as served:
        measure_all(served)
        yield served


def measure_all(served: Served) -> None:
    """Until predictions are made, so that every replica has been met and one has been measured."""
    deadline, rng = time.monotonic() + 300, random.Random(0)
    with Client(served.address) as client:
        while True:
            answer = collect(client.generate(prompt(rng, 70), SAMPLING, EXPLAIN))
            met = answer.routing.candidates == len(client.stats().replicas) == 3
            if met and answer.routing.HasField("predicted_first_token_s"):
                return
            assert time.monotonic() < deadline, answer.routing


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return rng.choices(range(10, 4096), k=tokens)


def test_prompts_go_where_their_prefix_is(three: Served):
    rng = random.Random(1)
    prefixes: list[list[int]] = []
    with Client(three.address) as client:

        def ask(prefix):
            answer = collect(client.generate(prefix + prompt(rng, 20), SAMPLING, EXPLAIN))
            return answer.routing, answer.usage

        homes: list[str] = []
        while len(set(homes)) < 3:
            assert len(homes) < 30, "cold prompts do not spread over idle replicas"
            prefixes.append(prompt(rng, 320))
            homes.append(ask(prefixes[-1])[0].replica_id)
        for _ in range(3):
            for prefix, home in zip(prefixes, homes, strict=True):
                routing, usage = ask(prefix)
                assert (routing.replica_id, routing.reason) == (home, "prefix")
                assert usage.cached_tokens == routing.expected_cached_tokens == 320
                assert routing.predicted_first_token_s > 0


async def test_a_prefix_that_all_ask_for_at_once_is_served_by_all(three: Served):
    rng = random.Random(2)
    hot, used = prompt(rng, 320), set()
    async with AsyncClient(three.address) as client:
        await collect_async(client.generate(hot, SAMPLING))
        for _ in range(5):
            asked = [client.generate(hot + prompt(rng, 300), SAMPLING, EXPLAIN) for _ in range(24)]
            answers = await asyncio.gather(*map(collect_async, asked))
            used |= {answer.routing.replica_id for answer in answers}
            if len(used) == 3:
                return
    raise AssertionError(f"only {used} served it")


async def test_requests_are_explained_only_if_asked(three: Served):
    async with AsyncClient(three.address) as client:
        answer = await collect_async(client.generate([5, 6, 7], SAMPLING))
    assert answer.routing is None


async def test_when_a_replica_dies_its_prompts_are_answered_by_others(three: Served):
    rng = random.Random(3)
    prefix = prompt(rng, 320)
    async with AsyncClient(three.address) as client:
        home = (await collect_async(client.generate(prefix, SAMPLING, EXPLAIN))).routing.replica_id
        victims = three.processes("Replica")
        assert len(victims) == 3
        long = SamplingParams(max_tokens=200, ignore_eos=True)
        streams = [client.generate(prefix + [9] * n, long, EXPLAIN) for n in (1, 2)]
        await asyncio.gather(*(anext(s) for s in streams))
        victims[0].kill()
        rest = await asyncio.gather(*map(collect_async, streams))
        assert all(answer.usage.output_tokens == 200 for answer in rest)
        again = await collect_async(client.generate(prefix, SAMPLING, EXPLAIN))
        assert again.usage.output_tokens == 4
        assert home
