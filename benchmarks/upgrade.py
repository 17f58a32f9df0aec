"""Rolling updates under load: no request fails, and every answer is the old replicas' or the new ones'.

    scripts/loopback python benchmarks/upgrade.py [--json FILE]

Ray Serve with two replicas of the demo model, and clients that ask without a pause, greedily, the same
prompts again and again. Then the application is deployed once more: in another KV format, with other weights
in the model's folder, with nothing changed, with another gateway on the same port, and without room for more
replicas than there are. What an answer may be is computed by an engine alone, before.

Counted: requests that failed; answers of neither version; blocks that a replica fetched while it was the only
one of its version, and that can only have come from another version; processes that were replaced though
nothing of theirs had changed, or not replaced though it had.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from rows import Row, merge, report
from safetensors.torch import load_file, save_file

from quire.cluster import CallOptions, Client, SamplingParams, collect
from quire.cluster.cli.ray_session import cluster
from quire.cluster.cli.rollout import APP, rolled_out, served
from quire.cluster.config import ServeConfig, parse
from quire.replicas.errors import QuireError
from quire.replicas.llm import LLM
from quire.replicas.model.checkpoint import find_model

CLIENTS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 12, 260, 24
CALM_S, LOOK_S = 4.0, 0.1
PORT = 18100
SAMPLING = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
Answer = tuple[int, ...]


@dataclass
class Load:
    """What the clients saw, and a watcher."""

    answers: Counter[tuple[int, Answer]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    fetched_alone: Counter[str] = field(default_factory=Counter)
    """By replica: blocks it fetched while no other one had its fingerprint."""
    versions: set[str] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        """Until it is over."""
        with Client(f"127.0.0.1:{PORT}") as client:
            while not self.over.is_set():
                number = (number + 5) % PROMPTS
                began = time.monotonic()
                try:
                    answer = collect(client.generate(prompt(number), SAMPLING, CallOptions(deadline_s=120)))
                except QuireError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                self.answers[number, tuple(answer.outputs[0].token_ids)] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def watch(self) -> None:
        """Until it is over."""
        before: dict[str, int] = {}
        with Client(f"127.0.0.1:{PORT}", retry_for_s=60) as client:
            while not self.over.wait(LOOK_S):
                replicas = client.stats().replicas
                alike = Counter(replica.fingerprint for replica in replicas)
                self.versions |= set(alike)
                for replica in replicas:
                    name, blocks = replica.replica_id, replica.fetched_blocks
                    if alike[replica.fingerprint] == 1 and len(replicas) > 1:
                        self.fetched_alone[name] += blocks - before.get(name, 0)
                    before[name] = blocks


def prompt(number: int) -> list[int]:
    return [10 + (number * 977 + i * i * 31) % 4000 for i in range(PROMPT_TOKENS)]


def expected(model: Path, kv: str) -> set[tuple[int, Answer]]:
    """What replicas with these weights and this format answer."""
    with LLM(str(model), kv=kv, device="cpu") as llm:
        done = llm.generate([prompt(n) for n in range(PROMPTS)], SAMPLING)
    return {(n, tuple(completion.outputs[0].token_ids)) for n, completion in enumerate(done)}


def config(model: Path, kv: str, revision: str = "", surge: int = 50, open_requests: int = 64) -> ServeConfig:
    return parse(
        {
            "engine": {
                "model": str(model),
                "revision": revision,
                "kv": kv,
                "device": "cpu",
                "threads_per_shard": 1,
                "pool": {"bytes": 16 << 20},
            },
            "gateway": {"cpus": 0.1, "port": PORT, "max_open_requests": open_requests},
            "replicas": {"count": 2, "cpus_per_shard": 0.1, "surge_percent": surge},
        }
    )


@contextmanager
def loaded() -> Iterator[Load]:
    """Clients at work while this lasts; what is open at the end is waited for."""
    load = Load()
    threads = [threading.Thread(target=load.ask, args=(n,)) for n in range(CLIENTS)]
    threads.append(threading.Thread(target=load.watch))
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.over.set()
        for thread in threads:
            thread.join()


def actors(deployment: str) -> set[str]:
    """Names of its processes; a new one has a new name."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if f"{APP}#{deployment}#" in actor["name"]}


def update(
    name: str, new: ServeConfig, allowed: set[tuple[int, Answer]], *, replaces: str, versions: int = 1
) -> list[Row]:
    """One deployment under load, as rows. `replaces`: the deployment that should be replaced, or none."""
    before = {deployment: actors(deployment) for deployment in ("Gateway", "Replica")}
    with loaded() as load:
        time.sleep(CALM_S)
        began = time.monotonic()
        rolled_out(new, APP, lambda words: None)
        seconds = time.monotonic() - began
        time.sleep(CALM_S)
    assert len(load.versions) == versions, f"{name}: {len(load.versions)} versions were seen"
    for failure in load.failures[:5]:
        print(f"{name}: {failure}", flush=True)
    stayed = {deployment: old & actors(deployment) for deployment, old in before.items()}
    requests = load.answers.total() + len(load.failures)
    zero = {
        "failed": len(load.failures),
        "answers of neither": sum(n for seen, n in load.answers.items() if seen not in allowed),
        "blocks of another version": load.fetched_alone.total() if versions > 1 else 0,
        "replaced in vain": sum(len(before[d] - stayed[d]) for d in before if d != replaces),
        "not replaced": sum(len(stayed[d]) for d in before if d == replaces),
    }
    counts = [Row(name, what, n, "", f"of {requests} requests", n / requests) for what, n in zero.items()]
    return [
        *counts,
        Row(name, "until all is new", seconds, "s", "itself", 1.0),
        Row(name, "slowest answer", load.slowest_s, "s", "until all is new", load.slowest_s / seconds),
    ]


def reweigh(folder: Path) -> None:
    """Slightly other weights, in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 0.98 for name, tensor in tensors.items()}, file, {"format": "pt"})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copytree(find_model("demo"), Path(folder, "model")))
        changed = Path(shutil.copytree(model, Path(folder, "changed")))
        reweigh(changed)
        first, second, third = expected(model, "int8"), expected(model, "int4"), expected(changed, "int4")
        start = config(model, "int8")
        with cluster(start, None), served(start, lambda words: None):
            new = config(model, "int4")
            rows += update("another format", new, first | second, replaces="Replica", versions=2)
            for file in changed.iterdir():
                shutil.copy(file, model)
            new = config(model, "int4", "2")
            rows += update("other weights", new, second | third, replaces="Replica", versions=2)
            rows += update("nothing changed", new, third, replaces="")
            new = config(model, "int4", "2", open_requests=65)
            rows += update("another gateway", new, third, replaces="Gateway")
            new = config(model, "int4", "3", surge=0, open_requests=65)
            rows += update("old ones stop first", new, third, replaces="Replica")
    report(rows, None)
    if args.json:
        merge(rows, args.json)
    return any(row.value for row in rows if row.unit == "")


if __name__ == "__main__":
    sys.exit(main())
