"""How long a shard of an 8B model takes to its first step, with nothing compiled yet and with all of it kept.

    python -m benchmarks.gpu startup --date 2026-01-31

Two processes one after the other, with caches of compiled code of their own that are empty for the first. The
weights are random numbers made on the device: reading 16 GB from a disk comes on top.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.models import LLAMA_8B
from benchmarks.gpu.shards import decode_steps, in_fresh_process
from benchmarks.rows import Row
from quire.replicas.config import EngineConfig
from quire.replicas.runner.shard import Shard

MODEL = LLAMA_8B
POLICY = "int4"
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def measure(ceilings: Ceilings) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: str(Path(folder, name.lower())) for name in _CACHES}
        for state in ("cold", "kept"):
            began = time.perf_counter()
            seconds = in_fresh_process(start, environment=environment)
            all_s = time.perf_counter() - began
            case = f"startup {POLICY} {MODEL} compiled code {state}"
            parts = {"process": all_s - sum(seconds.values()), **seconds, "total": all_s}
            print(f"{case}: " + ", ".join(f"{n} {s:.1f} s" for n, s in parts.items()), flush=True)
            yield from (Row(case, name, value, "s", "itself", 1.0) for name, value in parts.items())


def start() -> dict[str, float]:
    """Seconds of what a shard does until its first step is done; the process has its imports behind it."""
    marks = [time.perf_counter()]

    def loaded(done: int, total: int) -> None:
        if done == total:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(model=MODEL.save(folder), weights="random", kv=POLICY)
        shard = Shard(config, progress=loaded)
    marks.append(time.perf_counter())
    (batch,) = decode_steps(shard.num_pages, shard.layout.page_tokens, 32, 512, 1, shard.info.vocab_size)
    shard.forward(batch)
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    names = ("weights", "pool, compiling, graphs", "first step")
    return {name: end - begin for name, begin, end in zip(names, marks, marks[1:], strict=False)}
