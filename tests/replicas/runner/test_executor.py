"""The executor: shards elsewhere compute as one, and their deaths and errors reach the caller in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from shard_threads import Threads
from tiny_models import Chunk, make_model, reference_logits, some_tokens, step_of, tiny_config

from quire.replicas.config import PoolConfig
from quire.replicas.errors import ModelNotServable, ReplicaDied
from quire.replicas.runner.executor import Executor
from quire.replicas.runner.local_processes import LocalProcesses
from quire.replicas.runner.shard_process import ShardSpec

IDS = some_tokens(37)
STEP = step_of([Chunk(IDS, 0, [3, 1, 2])], 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _threads_of_this_process():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def repeat(act: Callable[[], object], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        act()
        time.sleep(0.01)


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def test_one_shard_needs_no_launcher(llama):
    executor = Executor(tiny_config(llama, threads_per_shard=1), None)
    torch.testing.assert_close(executor.run(STEP), reference_logits(llama, IDS), atol=1e-4, rtol=0)
    assert executor.num_pages == executor.shard.num_pages
    executor.check()
    executor.close()
    with pytest.raises(ReplicaDied, match="the replica is closed"):
        executor.run(STEP)


def test_shards_compute_as_one_and_stop_when_told(llama):
    launcher = Threads()
    executor = Executor(tiny_config(llama, tp=4, threads_per_shard=1), launcher)
    for _ in range(3):
        torch.testing.assert_close(executor.run(STEP), reference_logits(llama, IDS), atol=1e-4, rtol=0)
    time.sleep(1.2)  # idle long enough for a heartbeat
    executor.check()
    executor.run(STEP)
    executor.close()
    executor.close()
    assert launcher.stopped
    assert launcher.failure() == "shards [1, 2, 3] ended"
    assert launcher.errors == []
    with pytest.raises(ReplicaDied, match="the replica is closed"):
        executor.run(STEP)


def test_the_smallest_pool_counts(llama):
    small = PoolConfig(bytes=1 << 19, page_tokens=16)
    launcher = Threads(lambda spec: replace(spec, config=replace(spec.config, pool=small)))
    executor = Executor(tiny_config(llama, tp=2), launcher)
    assert executor.num_pages == (1 << 19) // executor.shard.layout.page_bytes < executor.shard.num_pages
    executor.close()


@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_ranks_error_while_loading_reaches_the_caller_as_it_was_raised(kv, llama, tmp_path):
    broken = make_model("llama", tmp_path) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])

    def third_is_broken(spec: ShardSpec) -> ShardSpec:
        return replace(spec, config=replace(spec.config, model=str(tmp_path))) if spec.rank == 3 else spec

    launcher = Threads(third_is_broken)
    with pytest.raises(ModelNotServable, match=r"model\.safetensors is damaged or incomplete") as caught:
        Executor(tiny_config(llama, kv, tp=4), launcher)
    assert [str(e) for e in launcher.errors] == [str(caught.value)]
    assert launcher.stopped
    assert launcher.failure() == "shards [1, 2, 3] ended"


def test_the_shards_of_a_replica_that_fails_to_load_are_stopped(tmp_path):
    broken = make_model("llama", tmp_path) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    before = children()
    with pytest.raises(ModelNotServable, match="damaged or incomplete"):
        Executor(tiny_config(tmp_path, tp=2))
    assert children() == before


def test_a_rank_may_load_for_longer_than_a_step_may_take(llama):
    def slow_on_rank_0(done: int, total: int) -> None:
        if done == 0:
            time.sleep(3)

    executor = Executor(tiny_config(llama, "int8", tp=2, shard_timeout_s=1.5), Threads(), slow_on_rank_0)
    executor.run(STEP)
    executor.close()


class NeverThere(Threads):
    def start(self, spec: ShardSpec) -> None: ...

    def failure(self) -> str | None:
        return "shard 1 had no room"


def test_a_shard_that_dies_before_it_arrives_ends_the_start(llama):
    with pytest.raises(ReplicaDied, match="shard 1 had no room"):
        Executor(tiny_config(llama, tp=2), NeverThere())


def test_an_error_in_a_step_reaches_the_caller_and_ends_the_replica(llama):
    launcher = Threads()
    executor = Executor(tiny_config(llama, tp=2, shard_timeout_s=1), launcher)
    outside = step_of([Chunk(IDS, 0, [10_000, 1, 2])], 16)
    with pytest.raises((IndexError, ReplicaDied)):
        executor.run(outside)
    assert not executor.can_go_on()
    with pytest.raises(ReplicaDied):
        executor.run(STEP)
    executor.close()


def test_one_shard_goes_on_after_an_error_in_a_step(llama):
    executor = Executor(tiny_config(llama, threads_per_shard=1))
    before = executor.run(STEP).clone()
    outside = step_of([Chunk([*IDS[:-1], 99_999], 0, [3, 1, 2])], 16)
    with pytest.raises(IndexError):
        executor.run(outside)
    assert executor.can_go_on()
    assert torch.equal(executor.run(STEP), before)
    executor.close()


def test_a_killed_process_fails_the_step_at_once(llama):
    before = children()
    launcher = LocalProcesses()
    executor = Executor(tiny_config(llama, tp=2, shard_timeout_s=100), launcher)
    torch.testing.assert_close(executor.run(STEP), reference_logits(llama, IDS), atol=1e-4, rtol=0)
    (child,) = children() - before
    os.kill(child, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(ReplicaDied):
        repeat(lambda: executor.run(STEP), within_s=50)
    assert time.monotonic() - started < 50  # far below shard_timeout_s
    with pytest.raises(ReplicaDied):
        executor.check()
    executor.close()
    assert children() == before


def test_a_hung_process_is_noticed_even_when_idle(llama):
    before = children()
    executor = Executor(tiny_config(llama, tp=2, shard_timeout_s=2), LocalProcesses())
    executor.run(STEP)
    (child,) = children() - before
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(ReplicaDied, match="limit 2 s"):
        repeat(executor.check, within_s=50)
    executor.close()
    assert children() == before


_PARENT = """
import sys
from pathlib import Path
from quire.replicas.config import EngineConfig
from quire.replicas.runner.executor import Executor
if __name__ == "__main__":
    Executor(EngineConfig(model=sys.argv[1], tp=2, device="cpu"))
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_shards_die_with_a_parent_that_is_killed(llama, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script, llama], stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        shards = psutil.Process(parent.pid).children(recursive=True)
        assert len(shards) == 1
        parent.kill()
    gone, alive = psutil.wait_procs(shards, timeout=60)
    assert (len(gone), alive) == (1, [])


def test_a_spec_travels_with_a_policy_file(llama):
    """Also a KV policy that is a mapping reaches the other processes."""
    policy = {"default": {"k": "int8", "v": "int4"}}
    executor = Executor(tiny_config(llama, policy, tp=2), Threads())
    assert executor.shard.info.kv_formats == (("int8", "int4"),) * 2
    executor.close()
