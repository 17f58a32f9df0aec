"""Broken applications in the cluster that RAY_ADDRESS names: `python damaged.py pages|weights FOLDER`.

`pages`: a prefill replica changes a bit of the blocks it sends. `weights`: weights are no numbers.
Prints the gateway's address; ends with its input, and the application with it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve
from reweighed import reweighed
from torch import Tensor

from quire.cluster import app
from quire.kvstore.peers.mover import Outgoing
from quire.replicas.deployment import Replica


class BadMemory(Replica):
    """One bit of whatever it sends first is another one than it was."""

    async def __init__(self, *args: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        read_chunk = Outgoing.read_chunk

        def damaged(source: Outgoing, index: int, buffer: Tensor) -> Tensor:
            chunk = read_chunk(source, index, buffer).clone()
            if index == 0:
                chunk[0] ^= 1
            return chunk

        Outgoing.read_chunk = damaged  # type: ignore[method-assign]
        await super().__init__(*args)  # type: ignore[misc]


def main(what: str, folder: Path) -> None:
    engine: dict[str, object] = {
        "model": "demo" if what == "pages" else str(reweighed(folder, by=math.nan)),
        "kv": "int8",
        "device": "cpu",
        "threads_per_shard": 1,
        "pool": {"bytes": 3 << 20},
    }
    tree: dict[str, Any] = {
        "engine": engine,
        "gateway": {"cpus": 0.1, "port": 0},
        "replicas": {"cpus_per_shard": 0.1, "graceful_shutdown_s": 1},
    }
    if what == "pages":
        tree["prefill"] = {"count": 1, "least_tokens": 100}
        app.Replica = BadMemory  # type: ignore[misc]
    ray.init(log_to_driver=False)
    handle = serve.run(app.build(tree), name=what, route_prefix=None)
    print(f"127.0.0.1:{handle.port.remote().result()}", flush=True)
    sys.stdin.read()
    serve.delete(what)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
