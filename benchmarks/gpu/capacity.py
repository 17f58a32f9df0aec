"""Sessions of 128K tokens that fit one card beside an 8B model with random weights, and how fast they decode.

The engine sizes its pool itself. As many sessions as that holds then decode together, at the level of the
shard and over random pages: no prompt is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.models import LLAMA_8B
from benchmarks.gpu.step import StepTime, floor_seconds, step_time
from benchmarks.rows import Row
from quire.replicas.runner.shard import Shard

MODEL = LLAMA_8B
CONTEXT_TOKENS = 131072
_STEPS = 8


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one card holds in one format."""

    pool_tokens: int
    time: StepTime
    """Of a step of all sessions that fit."""


def capacity(shard: Shard) -> Capacity:
    tokens = shard.num_pages * shard.layout.page_tokens
    return Capacity(tokens, step_time(shard, tokens // CONTEXT_TOKENS, CONTEXT_TOKENS, _STEPS))


def capacity_rows(policy: str, held: Capacity, bf16_tokens: int, ceilings: Ceilings) -> list[Row]:
    sessions = held.time.sequences
    rate = sessions / held.time.wall_s
    of_floor = floor_seconds(policy, held.time, ceilings) / held.time.wall_s
    case = f"capacity {policy} {MODEL} L={CONTEXT_TOKENS}"
    more = held.pool_tokens / bf16_tokens
    print(
        f"{case}: {held.pool_tokens} tokens = {more:.2f} x bf16, {sessions} sessions, {rate:.0f} tokens/s in "
        f"steps of {held.time.wall_s * 1e3:.1f} ms, {of_floor:.0%} of the floor's rate",
        flush=True,
    )
    return [
        Row(case, "pool", held.pool_tokens, "tokens", "our bf16", more),
        Row(case, "sessions", sessions, "sessions", "itself", 1.0),
        Row(case, "rate", rate, "tokens/s", "floor", of_floor),
    ]
