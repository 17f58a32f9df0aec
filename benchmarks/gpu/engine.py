"""Output tokens per second of the whole engine on an 8B model with random weights, by KV format.

All requests arrive at once and are continued greedily by as many tokens. Rates are of everything, prompts
included, and of decoding alone: the same prompts once more, found in the cache, as many as fit at once. In
bf16 fewer sessions may fit than are asked for; the others wait their turn, and the line says how many ran.

The floor: the prompts' arithmetic at the device's rate of matrix products, and then the bytes of all decode
steps at copy bandwidth. Its first part is the same in all formats, and so bounds what fewer bits can gain.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.models import LLAMA_8B
from benchmarks.rows import Row
from quire.replicas.config import SchedulerConfig
from quire.replicas.llm import LLM, Completion
from quire.replicas.request import SamplingParams

MODEL = LLAMA_8B
_DECODE_TOKENS = 256
"""New tokens of each request when decoding is timed alone."""
_WARM_UP_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one shape, all at once."""

    prompt_tokens: int
    new_tokens: int
    requests: int
    policies: tuple[str, ...]
    published: str
    """What others report for such a load: on another card and model, for orientation only."""

    def __str__(self) -> str:
        return f"in={self.prompt_tokens} out={self.new_tokens} requests={self.requests}"


LOADS = (
    Load(
        16384,
        1024,
        64,
        ("bf16", "int4"),
        "SAW-INT4 (Qwen3-8B, H100): bf16 471, int4 663 tokens/s = 1.41 x",
    ),
    Load(
        256, 1024, 32, ("bf16", "int4"), "SAW-INT4 (Qwen3-8B, H100): bf16 3795, int4 3689 tokens/s = 0.97 x"
    ),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """What one engine did with a load."""

    at_once: int
    """Whole sessions that the pool holds, at most all that are asked for."""
    tokens_s: float
    decode_tokens_s: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that a load takes at least."""

    prefill_s: float
    decode_s: float

    @property
    def all_s(self) -> float:
        return self.prefill_s + self.decode_s


SCHEDULER = SchedulerConfig(max_running=max(load.requests for load in LOADS))


def floor(policy: str, load: Load, at_once: int, ceilings: Ceilings) -> Floor:
    """With `at_once` sessions in every step, or all of them. Pure."""
    steps = load.new_tokens * max(1.0, load.requests / at_once)
    kv_tokens = load.requests * load.new_tokens * (load.prompt_tokens + load.new_tokens / 2)
    read_bytes = steps * MODEL.step_weight_bytes + MODEL.kv_bytes(policy, round(kv_tokens))
    prefill_flop = load.requests * MODEL.prefill_flop(load.prompt_tokens)
    return Floor(prefill_flop / ceilings.matmul_flop_s, read_bytes / ceilings.copy_bytes_s)


def decode_rate(done: Sequence[Completion]) -> float:
    """Tokens per second after the first ones, all of which one step yields if the prompts were cached."""
    first_s = min(c.timings.first_token_s for c in done)
    last_s = max(c.timings.total_s for c in done)
    return sum(c.usage.output_tokens - 1 for c in done) / (last_s - first_s)


def speed(llm: LLM, load: Load) -> Speed:
    _warm_up(llm, load)
    prompts = _prompts(load, load.requests)
    preempted = llm.stats().preemptions
    began = time.perf_counter()
    done = _generate(llm, prompts, load.new_tokens)
    seconds = time.perf_counter() - began
    preempted = llm.stats().preemptions - preempted
    pages = -(-(load.prompt_tokens + load.new_tokens) // llm.info.page_tokens)
    at_once = min(load.requests, llm.stats().pages_total // pages)
    # The last ones are most likely to be in the cache still; what is not is computed before the time counts.
    _generate(llm, prompts[-at_once:], 1)
    cached = _generate(llm, prompts[-at_once:], _decoding_alone(load, at_once).new_tokens)
    return Speed(at_once, sum(c.usage.output_tokens for c in done) / seconds, decode_rate(cached), preempted)


def _decoding_alone(load: Load, at_once: int) -> Load:
    return replace(load, requests=at_once, new_tokens=min(_DECODE_TOKENS, load.new_tokens))


def _warm_up(llm: LLM, load: Load) -> None:
    """Kernels and library plans for such prompts; no prompt of the load is cached by it."""
    requests = min(load.requests, max(2, _WARM_UP_TOKENS // load.prompt_tokens))
    _generate(llm, _prompts(load, requests, seed=1), 8, tenant="warm-up")


def _prompts(load: Load, requests: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(MODEL.config["vocab_size"]) for _ in range(load.prompt_tokens)]
        for _ in range(requests)
    ]


def _generate(llm: LLM, prompts: list[list[int]], new_tokens: int, tenant: str = "") -> list[Completion]:
    return llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True), tenant=tenant
    )


def engine_rows(policy: str, load: Load, speed: Speed, bf16: Speed, ceilings: Ceilings) -> list[Row]:
    least = floor(policy, load, speed.at_once, ceilings)
    new_tokens = load.requests * load.new_tokens
    of_floor = speed.tokens_s * least.all_s / new_tokens
    alone = _decoding_alone(load, speed.at_once)
    decode_floor = alone.requests * alone.new_tokens / floor(policy, alone, speed.at_once, ceilings).decode_s
    decode_of_floor = speed.decode_tokens_s / decode_floor
    faster = speed.tokens_s / bf16.tokens_s
    decode_faster = speed.decode_tokens_s / bf16.decode_tokens_s
    case = f"engine {policy} {MODEL} {load}"
    print(
        f"{case}: {speed.tokens_s:.0f} tokens/s = {faster:.2f} x our bf16, predicted at most "
        f"{new_tokens / least.all_s:.0f} ({of_floor:.0%}: prompts {least.prefill_s:.1f} s, decoding "
        f"{least.decode_s:.1f} s); decoding alone {speed.decode_tokens_s:.0f} tokens/s = "
        f"{decode_faster:.2f} x our bf16, predicted {decode_floor:.0f} "
        f"({decode_of_floor:.0%}); {speed.at_once} sessions at once, {speed.preemptions} preemptions",
        flush=True,
    )
    return [
        Row(case, "rate", speed.tokens_s, "tokens/s", "floor", of_floor),
        Row(case, "speedup", faster, "x", "our bf16", faster),
        Row(case, "decode rate", speed.decode_tokens_s, "tokens/s", "floor", decode_of_floor),
        Row(case, "decode speedup", decode_faster, "x", "our bf16", decode_faster),
        Row(case, "sessions at once", speed.at_once, "sessions", "requests", speed.at_once / load.requests),
    ]


def print_bound(load: Load, bf16: Speed, ceilings: Ceilings) -> None:
    """What the floors allow at most, on this card."""
    slow = floor("bf16", load, bf16.at_once, ceilings)
    fast = floor("int4", load, load.requests, ceilings)
    print(
        f"bound {load}: int4 at most {slow.all_s / fast.all_s:.2f} x bf16, since both need "
        f"{slow.prefill_s:.1f} s for the prompts; decoding alone {slow.decode_s / fast.decode_s:.2f} x. "
        f"Published: {load.published}",
        flush=True,
    )
