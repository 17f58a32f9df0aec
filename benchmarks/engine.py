"""Output tokens per second of the engine, beside transformers' own batching on the same requests.

    python benchmarks/engine.py [--json FILE]

Cases: `bf16`, `int8`, `int4` KV on 32 concurrent requests with prompts of mixed length, each continued by as
many tokens; then the quantized formats against our own bf16 at 1K and 8K tokens of context. Baselines run in
their own best setting: the weights' own bf16 and transformers' paged and padded batching; the time that
continuous batching takes to set itself up is not counted against it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from rows import Row, alternate, median, report
from transformers import AutoModelForCausalLM, GenerationConfig

from quire.replicas.config import PoolConfig
from quire.replicas.llm import LLM
from quire.replicas.model.checkpoint import find_model
from quire.replicas.request import SamplingParams

FORMATS = ("bf16", "int8", "int4")
REQUESTS, NEW_TOKENS = 32, 96
DTYPE: Literal["bfloat16"] = "bfloat16"
GREEDY = {"ignore_eos": True}


def prompts_of(lengths: list[int], seed: int, vocabulary: int = 4096) -> list[list[int]]:
    """Random tokens: the time of a step does not depend on which tokens they are."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocabulary) for _ in range(n)] for n in lengths]


def mixed_lengths() -> list[int]:
    rng = random.Random(0)
    return [rng.choice([32, 64, 128, 256, 512]) + rng.randrange(16) for _ in range(REQUESTS)]


class Baselines:
    """transformers with its weights in their own type."""

    def __init__(self) -> None:
        folder = find_model("demo")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE)).eval()
        self.greedy = GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )

    @torch.no_grad()
    def padded(self, prompts: list[list[int]]) -> float:
        """Tokens per second of `generate` on the left-padded batch."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        started = time.perf_counter()
        out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.greedy)
        return len(prompts) * (out.shape[1] - longest) / (time.perf_counter() - started)

    def continuous(self, prompts: list[list[int]]) -> float:
        """Tokens per second of `generate_batch`, from the first request's submission to the last token."""
        results = self.model.generate_batch(
            prompts, generation_config=self.greedy, record_timestamps=True, warmup=False
        ).values()
        seconds = max(r.timestamps[-1] for r in results) - min(r.created_time for r in results)
        return sum(len(r.generated_tokens) for r in results) / seconds


def our_speed(llm: LLM, prompts: list[list[int]], tenant: str, new_tokens: int = NEW_TOKENS) -> float:
    """Tokens per second from submission to the last token; a fresh tenant finds nothing cached."""
    sampling = SamplingParams(max_tokens=new_tokens, **GREEDY)
    started = time.perf_counter()
    done = llm.generate(prompts, sampling, tenant=tenant)
    seconds = time.perf_counter() - started
    return sum(c.usage.output_tokens for c in done) / seconds


def against_transformers(rounds: int) -> list[Row]:
    prompts = prompts_of(mixed_lengths(), seed=1)
    baselines = Baselines()
    engines = {kv: LLM("demo", kv=kv, dtype=DTYPE) for kv in FORMATS}
    calls = {kv: lambda r, llm=llm: our_speed(llm, prompts, f"round {r}") for kv, llm in engines.items()}
    calls |= {
        "generate_batch": lambda r: baselines.continuous(prompts),
        "generate": lambda r: baselines.padded(prompts),
    }
    speeds = alternate(calls, rounds)
    rows = []
    for kv in FORMATS:
        for baseline in ("generate_batch", "generate"):
            rows.append(_row(kv, median(speeds[kv]), baseline, median(speeds[baseline])))
    for llm in engines.values():
        llm.close()
    return rows


def against_our_bf16(rounds: int, context: int, requests: int) -> list[Row]:
    """Decoding at depth: every request's own context is cached beforehand, so that decoding dominates."""
    with tempfile.TemporaryDirectory() as folder:
        model = longer_model(Path(folder), context + 2048)
        contexts = prompts_of([context] * requests, seed=context)
        prompts = [tokens + [7] * 8 for tokens in contexts]
        pool = PoolConfig(bytes=1 << 30)
        engines = {kv: LLM(model, kv=kv, dtype=DTYPE, pool=pool) for kv in FORMATS}
        for llm in engines.values():
            llm.generate(contexts, SamplingParams(temperature=0, max_tokens=1))
        calls: dict[str, Callable[[int], float]] = {
            kv: lambda r, llm=llm: our_speed(llm, prompts, "", 64) for kv, llm in engines.items()
        }
        speeds = alternate(calls, rounds)
        for llm in engines.values():
            llm.close()
    return [
        _row(
            f"{kv} context={context} requests={requests}",
            median(speeds[kv]),
            "our bf16",
            median(speeds["bf16"]),
        )
        for kv in FORMATS[1:]
    ]


def longer_model(folder: Path, tokens: int) -> str:
    """The demo model told that it may read further than it was trained to: fine for timing only."""
    shutil.copytree(find_model("demo"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return str(folder)


def _row(case: str, value: float, baseline: str, baseline_value: float) -> Row:
    return Row(case, "output_tokens_per_s", value, "tokens/s", baseline, value / baseline_value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = against_transformers(args.rounds)
    rows += against_our_bf16(args.rounds, context=1024, requests=32)
    rows += against_our_bf16(args.rounds, context=8192, requests=8)
    report(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
