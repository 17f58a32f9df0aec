"""The hit rate when one of three replicas leaves, with its blocks handed over and without.

    scripts/loopback env PYTHONPATH=src:tests/support python benchmarks/scale_in.py [--json FILE]

Three replicas of the demo model in one process, over real links and a directory; 48 prompts of 600 tokens,
each asked once of a random replica, then once more when one has left. Hits are prompt tokens that were not
computed: found in the pool, or fetched, which is always chosen here, however quick computing would be. The
baseline is the second round with all replicas.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from neighbourhood import Resident, Town
from rows import Row, report

from quire.kvstore.peers.cost import Choice, CostModel, Decision
from quire.replicas.config import EngineConfig, PoolConfig, StoreConfig
from quire.replicas.engine import prefix_waits

PROMPTS, PROMPT_TOKENS = 48, 600
CONFIG = EngineConfig(
    model="demo",
    kv="int8",
    device="cpu",
    threads_per_shard=1,
    pool=PoolConfig(bytes=64 << 20),
    store=StoreConfig(lookup_timeout_s=2.0),
)


class AlwaysFetch(CostModel):
    """So that the rate tells what the replicas hold, not how quick this small model computes."""

    def decide(self, *_: object) -> Decision:
        return Decision(Choice.FETCH, None, None)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(10, 4096) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]


def hit_rate(leaves: bool, hands_over: bool) -> float:
    """Of the second round."""
    rng, town = random.Random(1), Town()
    prefix_waits.CostModel = AlwaysFetch  # type: ignore[misc]
    residents = [Resident(town, name, CONFIG) for name in "abc"]
    try:
        for resident in residents:
            resident.ask(rng.choices(range(10, 4096), k=200), tenant=str(resident.way.me))
        for prompt in prompts():
            rng.choice(residents).ask(prompt, 1)
        if leaves:
            leaver = residents.pop(0)
            if hands_over:
                others = [resident.way.me for resident in residents]
                leaver.engine.hand_over(others, within_s=CONFIG.store.hand_over_s)
            leaver.move_out()
        usages = [rng.choice(residents).ask(prompt, 1)[-1].usage for prompt in prompts()]
    finally:
        for resident in residents:
            resident.move_out()
    return sum(u.cached_tokens for u in usages if u) / (PROMPTS * PROMPT_TOKENS)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = {"none leaves": (False, False), "handed over": (True, True), "not handed over": (True, False)}
    rates = {name: hit_rate(*case) for name, case in cases.items()}
    base = rates["none leaves"]
    rows = [
        Row(f"scale-in {name}", "hit rate", rate, "", "none leaves", rate / base)
        for name, rate in rates.items()
    ]
    report(rows, args.json)
    return 0 if rates["handed over"] > base - 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
