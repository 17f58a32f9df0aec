"""Sessions of 128K tokens that fit one card beside an 8B model with random weights, and how fast they decode.

    python -m benchmarks.gpu capacity --date 2026-01-31

The engine sizes its pool itself. As many sessions as that holds then decode together, at the level of the
shard and over random pages: no prompt is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.models import LLAMA_8B
from benchmarks.gpu.shards import in_fresh_process, random_shard
from benchmarks.gpu.step import StepTime, floor_seconds, step_time
from benchmarks.rows import Row

MODEL = LLAMA_8B
POLICIES = ("bf16", "int8", "int4")
CONTEXT_TOKENS = 131072
_STEPS = 8


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one card holds in one format."""

    pool_tokens: int
    time: StepTime
    """Of a step of all sessions that fit."""


def measure(ceilings: Ceilings) -> Iterator[Row]:
    bf16_tokens = 0
    for policy in POLICIES:
        held = in_fresh_process(_capacity, policy)
        bf16_tokens = held.pool_tokens if policy == "bf16" else bf16_tokens
        yield from _rows(policy, held, bf16_tokens, ceilings)


def _capacity(policy: str) -> Capacity:
    shard = random_shard(MODEL, policy)
    tokens = shard.num_pages * shard.layout.page_tokens
    return Capacity(tokens, step_time(shard, tokens // CONTEXT_TOKENS, CONTEXT_TOKENS, _STEPS))


def _rows(policy: str, held: Capacity, bf16_tokens: int, ceilings: Ceilings) -> list[Row]:
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
