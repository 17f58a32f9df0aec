"""Updates and dead gateways under real Ray Serve: no request fails, and every answer is one version's."""

import asyncio
import os
import random
import signal

import psutil
import pytest
import ray
import yaml
from served_app import free_port, quire

from quire.cluster import AsyncClient, SamplingParams, collect_async
from quire.cluster.cli.rollout import APP, rolled_out, served
from quire.cluster.config import parse
from quire.cluster.gateway_registry import addresses
from quire.replicas.errors import ConfigError, ReplicaDied, UnknownModel

pytestmark = pytest.mark.ray

PORT = free_port()
SAMPLING = SamplingParams(max_tokens=16, ignore_eos=True)
LONG = SamplingParams(max_tokens=300, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=300, ignore_eos=True, temperature=1.0)
PROMPTS = [f"Long ago, a {who} named {name}" for who in ("cat", "fox", "hen") for name in "ABCD"]


TREE = {
    "engine": {"model": "demo", "kv": "int8", "threads_per_shard": 1, "pool": {"bytes": 8 << 20}},
    "gateway": {"port": PORT, "cpus": 0.1},
    "replicas": {"cpus_per_shard": 0.1, "surge_percent": 100, "health_check_period_s": 0.5},
}


def config(kv="int8", **gateway):
    return parse(TREE | {"engine": TREE["engine"] | {"kv": kv}, "gateway": TREE["gateway"] | gateway})


@pytest.fixture(scope="module", autouse=True)
def up(joined):
    with served(config(), lambda words: None):
        yield


def actors() -> dict[str, str]:
    """The only process of each deployment, by its actor's name."""
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return {name.split("#")[1]: name for name in named if f"::{APP}#" in name}


async def roll_out(new) -> None:
    await asyncio.to_thread(rolled_out, new, APP, lambda words: None)


async def answers(address: str = f"127.0.0.1:{PORT}") -> list[list[int]]:
    async with AsyncClient(address) as client:
        found = await asyncio.gather(*(collect_async(client.generate(p, SAMPLING)) for p in PROMPTS))
    return [answer.outputs[0].token_ids for answer in found]


async def answers_during(update) -> list[list[list[int]]]:
    """What all prompts were answered, again and again until the update was over and once more."""
    work, rounds = asyncio.create_task(update), []
    while not work.done():
        rounds.append(await answers())
    await work
    return [*rounds, await answers()]


async def test_without_a_change_nothing_is_replaced():
    before = actors()
    await roll_out(config())
    assert actors() == before


async def test_what_the_cluster_can_never_hold_is_refused_and_replaces_nothing():
    before, new = actors(), parse(TREE | {"replicas": TREE["replicas"] | {"cpus_per_shard": 500.0}})
    with pytest.raises(
        ConfigError, match=r"1 replica with 500 CPU: no node has that; the cluster has 1 node"
    ):
        await roll_out(new)
    assert actors() == before


async def test_a_folder_that_the_replicas_node_lacks_is_named_with_the_node():
    before, right = actors(), await answers()
    new = parse(TREE | {"engine": TREE["engine"] | {"model": "/nowhere/at/all"}})
    with pytest.raises(UnknownModel, match=r"node [\d.]+ has no folder /nowhere/at/all"):
        await roll_out(new)
    assert await answers() == right
    await roll_out(config())
    assert actors()["Gateway"] == before["Gateway"]


async def test_the_commands_find_the_application_and_leave_it_alone(tmp_path):
    file, before = tmp_path / "serve.yaml", actors()
    file.write_text(yaml.safe_dump({"applications": [{"name": APP, "args": TREE}]}))
    at = ("--ray-address", ray.get_runtime_context().gcs_address)
    done = await asyncio.to_thread(quire, "deploy", str(file), *at)
    assert f"serving demo at 127.0.0.1:{PORT}" in done.stderr
    assert (await asyncio.to_thread(quire, "gateways", *at)).stdout == f"127.0.0.1:{PORT}\n"
    nobody = await asyncio.to_thread(quire, "gateways", "--app", "other", *at)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert actors() == before


async def test_another_format_replaces_the_replica_and_fails_nobody():
    before, old = actors(), await answers()
    rounds = await answers_during(roll_out(config("int4")))
    after, new = actors(), rounds[-1]
    assert after["Gateway"] == before["Gateway"]
    assert after["Replica"] != before["Replica"]
    assert new != old
    for found in rounds:
        assert all(one in versions for one, *versions in zip(found, old, new, strict=True))


async def test_another_gateway_takes_the_port_over_and_fails_nobody():
    before = actors()
    rounds = await answers_during(roll_out(config("int4", max_open_requests=99)))
    after = actors()
    assert after["Replica"] == before["Replica"]
    assert after["Gateway"] != before["Gateway"]
    assert all(found == rounds[0] for found in rounds)


async def test_a_gateway_that_dies_costs_the_others_streams_nothing():
    await roll_out(config("int4", port=0, count=2))
    both = addresses(APP)
    assert len(both) == 2
    right = await _long_answers(both)
    victim = _who_listens_at(both[0])  # takes a second on a busy machine: too long once streams have begun
    random.seed(7)  # some clients begin at the one, some at the other
    clients = [AsyncClient(",".join(both)) for _ in PROMPTS]
    streams = [
        c.generate(p, LONG if n % 2 else DRAWN) for n, (c, p) in enumerate(zip(clients, PROMPTS, strict=True))
    ]
    first = await asyncio.gather(*(anext(stream) for stream in streams))
    at = [client.gateway for client in clients]
    os.kill(victim, signal.SIGKILL)
    results = await asyncio.gather(*(collect_async(s) for s in streams), return_exceptions=True)
    for n, (begun, rest) in enumerate(zip(first, results, strict=True)):
        if n % 2 == 0 and at[n] == both[0]:
            assert isinstance(rest, ReplicaDied)
            assert rest.retry_s > 0
            continue
        tokens = [*begun.token_ids, *rest.outputs[0].token_ids]
        assert tokens == right[n] if n % 2 else len(tokens) == DRAWN.max_tokens
    assert set(at) == set(both)
    async with AsyncClient(both[1]) as client, asyncio.timeout(120):  # what it had open has ended
        while (await client.stats()).replicas[0].running:
            await asyncio.sleep(0.1)
    async with asyncio.timeout(300):
        while len(found := await asyncio.to_thread(addresses, APP)) < 2 or both[0] in found:
            await asyncio.sleep(0.2)
    assert await answers(found[0]) == await answers(found[1])


async def _long_answers(gateways: list[str]) -> list[list[int]]:
    async with AsyncClient(gateways[0]) as client:
        found = await asyncio.gather(*(collect_async(client.generate(p, LONG)) for p in PROMPTS))
    return [answer.outputs[0].token_ids for answer in found]


def _who_listens_at(address: str) -> int:
    port = int(address.rpartition(":")[2])
    (listener,) = [
        c for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == psutil.CONN_LISTEN
    ]
    return listener.pid
