"""Load of the directory: memory of an entry, lookups and announcements a second, and what a fleet would need.

    python benchmarks/directory.py [--entries N] [--json FILE]

Measured on one directory in this process, without Ray's calls. The last rows are arithmetic on the figures
above them: 1,000 replicas, 10^8 blocks, the shards that bound each to 2 GB and to half of one core.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
from rows import Row, report

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.directory import Announcement, Directory
from quire.kvstore.peers.ids import ReplicaId

REPLICAS, CHAIN, BATCH = 100, 64, 1000
FLEET, BLOCKS = 1000, 100_000_000
REQUESTS_A_REPLICA, NEW_BLOCKS_A_REPLICA = 20.0, 200.0  # a second
SHARD_BYTES, SHARD_CORE = 2e9, 0.5


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description="The directory's memory and speed.")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keys = np.random.default_rng(0).integers(0, 256, (args.entries, 8), dtype=np.uint8).tobytes()
    directory, number = Directory(2 * args.entries), [0] * REPLICAS
    before, started = resident_bytes(), time.perf_counter()
    step = BATCH * 8
    for turn, at in enumerate(range(0, len(keys), step)):
        r = turn % REPLICAS
        directory.announce(Announcement(ReplicaId(f"r{r}"), number[r], keys[at : at + step], b""), 0.0)
        number[r] += 1
    announce_s = (time.perf_counter() - started) / args.entries
    entry_bytes = (resident_bytes() - before) / directory.stats().entries

    # Chains whose blocks one replica holds: consecutive hints of one announcement.
    rng = random.Random(0)
    chains = []
    for _ in range(2000):
        at = rng.randrange(args.entries // BATCH) * BATCH
        hints = [keys[8 * i : 8 * i + 8] for i in range(at, at + CHAIN)]
        chains.append([BlockKey(hint + bytes(24)) for hint in hints])
    started = time.perf_counter()
    for chain in chains:
        assert directory.lookup(chain)[0].blocks == CHAIN
    lookup_s = (time.perf_counter() - started) / len(chains)

    by_memory = BLOCKS * entry_bytes / SHARD_BYTES
    cores = FLEET * (REQUESTS_A_REPLICA * lookup_s + 2 * NEW_BLOCKS_A_REPLICA * announce_s)
    case = f"{args.entries:,} entries, chains of {CHAIN}"
    fleet = f"{FLEET:,} replicas, {BLOCKS:.0e} blocks"
    report(
        [
            Row(case, "entry_bytes", entry_bytes, "bytes", "hint and owner", entry_bytes / 12),
            Row(case, "lookups_per_s", 1 / lookup_s, "/s", "itself", 1.0),
            Row(case, "hints_announced_per_s", 1 / announce_s, "/s", "itself", 1.0),
            Row(fleet, "shards_for_memory", by_memory, "shards", f"{SHARD_BYTES / 1e9:.0f} GB each", 1.0),
            Row(fleet, "cores", cores, "cores", f"{SHARD_CORE} core a shard", cores / SHARD_CORE),
        ],
        args.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
