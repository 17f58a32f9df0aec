"""Replicas join, leave and stall at random and fetch each other's blocks: what is served must be right.

    scripts/loopback python benchmarks/churn.py [--replicas 50] [--seconds 600] [--json FILE]

Each replica (`churn_replica.py`) is a thread that does what an engine's does, with a real pool, exchange,
mover, transport (TCP) and announcer; one real directory has room for fewer entries than there are blocks. A
replica leaves without a goodbye: its transport is closed whatever it carries, and the directory learns of
half the deaths by silence alone. It comes back under another name, with nothing. Now and then one stalls for
longer than a fetch may take.

What counts, and must be 0 for the exit status to be 0: pages served with other bytes than their key's,
directory entries above the bound, fetches that ended later than their deadline or never, pages that any
survivor's books do not account for when all is quiet, uncaught errors, threads left after all are closed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from churn_replica import ENTRIES, LINKS, PAGES, TRANSFERS, Replica, World, all_chains
from rows import Row, report

from quire.kvstore.peers.ids import ReplicaId

LIFE_S, AWAY_S = 30.0, 3.0  # means
SETTLE_S = 2 * (TRANSFERS.timeout_s + LINKS.operation_timeout_s)
REPORT_S = 30.0


def slot(number: int, world: World) -> None:
    """One replica after another, until there shall be no more."""
    rng = random.Random(number)
    for incarnation in itertools.count():
        if world.quiet.wait(rng.expovariate(1 / AWAY_S)):
            return
        replica = Replica(ReplicaId(f"{number}.{incarnation}"), world, rng)
        world.counts.add("joined")
        try:
            replica.live(time.monotonic() + rng.expovariate(1 / LIFE_S))
            if world.over.is_set():
                world.counts.add("survivors")
                world.counts.add("pages unaccounted", replica.unaccounted())
                return
        finally:
            replica.leave()
        del replica  # and with it the store where its links met


def churn(replicas: int, seconds: float) -> World:
    """Let it happen, and say every now and then how it goes."""
    world, started_s = World(all_chains()), time.monotonic()

    def uncaught(error: threading.ExceptHookArgs) -> None:
        world.counts.add("uncaught errors")
        threading.__excepthook__(error)

    threading.excepthook = uncaught
    with ThreadPoolExecutor(replicas, "replica") as executor:
        slots = [executor.submit(slot, number, world) for number in range(replicas)]
        while (left_s := started_s + seconds - time.monotonic()) > 0:
            time.sleep(min(left_s, REPORT_S))
            progress(world, time.monotonic() - started_s)
        world.quiet.set()
        time.sleep(SETTLE_S)
        world.over.set()
    for ended in slots:
        ended.result()
    return world


def progress(world: World, seconds: float) -> None:
    counts, status = world.counts.snapshot(), Path("/proc/self/status").read_text()
    resident_mb = int(status.split("VmRSS:")[1].split()[0]) / 1e3
    failed = sum(number for name, number in counts.items() if name.startswith("failed"))
    threads = f"{threading.active_count()} Python threads of {status.split('Threads:')[1].split()[0]}"
    print(
        f"{seconds:4.0f} s: {len(world.peers)} live, {counts['joined']} joined, "
        f"{counts['fetches']} fetches, {failed} failed, "
        f"{counts['wrong pages']} of {counts['pages compared']} pages wrong, "
        f"{world.desk.most_entries} entries, {world.desk.most_owners} owners at most; "
        f"{resident_mb:.0f} MB, {threads}, {len(os.listdir('/proc/self/fd'))} files",
        flush=True,
    )


def threads_left(limit_s: float = 10.0) -> int:
    """Of ours, after everything was closed; they are given a while to end."""
    end_s = time.monotonic() + limit_s
    while (left := threading.active_count() - 1) and time.monotonic() < end_s:
        time.sleep(0.05)
    return left


def rows_of(case: str, world: World) -> tuple[list[Row], bool]:
    """The figures, and whether all that must be 0 is."""
    counts, desk = world.counts.snapshot(), world.desk
    rows: list[Row] = []

    def row(metric: str, value: int, against: str, whole: int) -> None:
        rows.append(Row(case, metric.replace(" ", "_"), value, "", against, value / max(whole, 1)))

    joined, fetches, survivors = counts["joined"], counts["fetches"], counts["survivors"]
    row("joined", joined, "survivors", survivors)
    row("stalls", counts["stalls"], "requests", counts["requests"])
    row("fetches", fetches, "requests", counts["requests"])
    row("fetched", counts["fetched"], "fetches", fetches)
    for name in sorted(name for name in counts if name.startswith(("failed", "not begun"))):
        row(name, counts[name], "fetches", fetches)
    row("pages fetched", counts["pages fetched"], "pages compared", counts["pages compared"])
    row("most directory entries", desk.most_entries, "bound", ENTRIES)
    row("directory evictions", desk.evicted, "bound", ENTRIES)
    row("most directory owners", desk.most_owners, "joined", joined)
    faults = {
        "wrong pages": counts["wrong pages"],
        "entries above bound": max(desk.most_entries - ENTRIES, 0),
        "fetches late": counts["fetches late"],
        "fetches never ended": counts["fetches never ended"],
        "pages unaccounted": counts["pages unaccounted"],
        "uncaught errors": counts["uncaught errors"],
        "threads left": threads_left(),
    }
    wholes = {"wrong pages": counts["pages compared"], "pages unaccounted": PAGES * survivors}
    for name, number in faults.items():
        row(name, number, "pages" if name in wholes else "fetches", wholes.get(name, fetches))
    return rows, not any(faults.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Replicas join and leave; what is served must be right.")
    parser.add_argument("--replicas", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = churn(args.replicas, args.seconds)
    rows, sound = rows_of(f"{args.replicas} replicas, {args.seconds:g} s", world)
    report(rows, args.json)
    return not sound


if __name__ == "__main__":
    sys.exit(main())
