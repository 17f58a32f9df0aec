"""Time to first token of a 1,000-token prompt whose first 960 tokens are cached, beside the same prompt cold.

python benchmarks/prefix.py [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from rows import Row, alternate, median, report

from quire.replicas import LLM, SamplingParams

PROMPT_TOKENS, CACHED_TOKENS = 1000, 960
FORMATS = ("bf16", "int8", "int4")
FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1)


def first_token_s(llm: LLM, prompt: list[int], tenant: str, cached_tokens: int) -> float:
    """Seconds until the first token; what was found cached is checked, not assumed."""
    (completion,) = llm.generate([prompt], FIRST_TOKEN, tenant=tenant)
    assert completion.usage.cached_tokens == cached_tokens
    return completion.timings.first_token_s


def rows_of(kv: str, rounds: int) -> list[Row]:
    rng = random.Random(0)
    prompt = [rng.randrange(10, 4096) for _ in range(PROMPT_TOKENS)]
    others = [
        prompt[:CACHED_TOKENS] + [rng.randrange(10, 4096) for _ in prompt[CACHED_TOKENS:]]
        for _ in range(rounds)
    ]
    with LLM("demo", kv=kv) as llm:
        llm.generate([prompt], FIRST_TOKEN, tenant="warm")
        seconds = alternate(
            {
                "cold": lambda r: first_token_s(llm, prompt, f"tenant {r}", 0),
                "cached": lambda r: first_token_s(llm, others[r], "warm", CACHED_TOKENS),
            },
            rounds,
        )
    cold, cached = median(seconds["cold"]), median(seconds["cached"])
    return [
        Row(f"{kv} cold", "first_token_ms", cold * 1e3, "ms", "itself", 1.0),
        Row(
            f"{kv} {CACHED_TOKENS} of {PROMPT_TOKENS} cached",
            "first_token_ms",
            cached * 1e3,
            "ms",
            "cold",
            cached / cold,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Time to first token, cached and cold.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report([row for kv in FORMATS for row in rows_of(kv, args.rounds)], args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
