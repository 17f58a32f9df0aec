"""A shard's decode step of an 8B model with random weights, against the time its bytes take.

The floor is what must be read, weights and K and V, at the device's copy bandwidth. Steps follow each other
as an engine makes them, each one token further, page tables at random over the whole pool; the host's part is
in the time. `host` compares that with the device's own time for the same steps: what is above 1 is waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.models import LLAMA_8B
from benchmarks.gpu.shards import decode_steps, forwards
from benchmarks.gpu.timing import device_seconds, wall_seconds
from benchmarks.rows import Row
from quire.replicas.runner.shard import Shard

MODEL = LLAMA_8B
CASES = ((64, 8192), (32, 512), (32, 8192), (1, 8192))
"""Sequences, and tokens of each."""
_STEPS = 24


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one of `steps` that end at `tokens` a sequence."""

    sequences: int
    tokens: int
    steps: int
    wall_s: float
    device_s: float | None
    """None: could not be told from the host's."""

    @property
    def kv_tokens(self) -> int:
        """Tokens in all sequences together, in the mean of the steps."""
        return round(self.sequences * (self.tokens - (self.steps - 1) / 2))


def step_time(shard: Shard, sequences: int, tokens: int, steps: int = _STEPS) -> StepTime:
    """Of decode steps that end at `tokens` a sequence. Raises ValueError where the pool cannot hold them."""
    batches = decode_steps(
        shard.num_pages, shard.layout.page_tokens, sequences, tokens, steps, shard.info.vocab_size
    )
    calls = forwards(shard, batches)
    wall_s = wall_seconds(calls)
    return StepTime(sequences, tokens, steps, wall_s, device_seconds(calls, wall_s))


def floor_seconds(policy: str, time: StepTime, ceilings: Ceilings) -> float:
    read_bytes = MODEL.step_weight_bytes + MODEL.kv_bytes(policy, time.kv_tokens)
    return read_bytes / ceilings.copy_bytes_s


def step_times(shard: Shard) -> list[StepTime]:
    """Of all cases that the pool can hold."""
    times = []
    for sequences, tokens in CASES:
        try:
            times.append(step_time(shard, sequences, tokens))
        except ValueError as error:
            print(f"step B={sequences} L={tokens} is left out: {error}", flush=True)
    return times


def step_rows(policy: str, time: StepTime, ceilings: Ceilings) -> list[Row]:
    floor_s = floor_seconds(policy, time, ceilings)
    case = f"step {policy} {MODEL} B={time.sequences} L={time.tokens}"
    rows = [Row(case, "time", time.wall_s * 1e3, "ms", "floor", time.wall_s / floor_s)]
    gap = "host gap unknown"
    if time.device_s is not None:
        ratio = time.wall_s / time.device_s
        rows.append(Row(case, "host", time.wall_s * 1e3, "ms", "device alone", ratio))
        gap = f"device alone {time.device_s * 1e3:.3f} ms, host gap {1 - 1 / ratio:.1%}"
    print(
        f"{case}: {time.wall_s * 1e3:.3f} ms = {time.wall_s / floor_s:.2f} x floor "
        f"({floor_s * 1e3:.3f} ms), {gap}",
        flush=True,
    )
    return rows
