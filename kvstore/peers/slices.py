"""Which bytes of a block's pages go from which shard to which, when tensor-parallel sizes differ.

Pure. A page is head-major, so that a run of kv heads is one byte range in the pages of either side.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageSlice:
    """A byte range that every page of one transfer sends from one source shard to one destination shard."""

    source: int
    """Rank of the sender."""
    destination: int
    """Rank."""
    first_head: int
    """Number of the first kv head, in the whole model."""
    heads: int
    source_at: int
    """Byte offset in the source's page."""
    destination_at: int
    """Byte offset in the destination's page."""
    size_bytes: int


def fits(tp: int, kv_heads: int) -> bool:
    """Tell whether `tp` shards can hold a model of `kv_heads`."""
    return tp > 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def shard_heads(rank: int, tp: int, kv_heads: int) -> range:
    """Return the kv heads in a shard's pages; with fewer heads than shards, several hold the same one.

    Raises: ValueError where neither of `tp` and `kv_heads` divides the other.
    """
    if not fits(tp, kv_heads):
        raise ValueError(f"tp={tp} neither divides {kv_heads} kv heads nor is a multiple of them")
    per_shard = max(kv_heads // tp, 1)
    first = rank * kv_heads // tp
    return range(first, first + per_shard)


def page_slices(source_tp: int, destination_tp: int, kv_heads: int, head_bytes: int) -> tuple[PageSlice, ...]:
    """Return slices that fill every destination page exactly once, by destination rank, then by head.

    Of shards that hold the same head, destinations take turns. There is at most one slice between two ranks.
    Example: tp 2 → 1 with 4 heads: heads 0–1 from rank 0 to the front half, 2–3 from rank 1 to the back half.
    """
    slices = []
    for destination in range(destination_tp):
        wanted = shard_heads(destination, destination_tp, kv_heads)
        for source, heads in _runs(destination, wanted, source_tp, kv_heads):
            slices.append(
                PageSlice(
                    source=source,
                    destination=destination,
                    first_head=heads.start,
                    heads=len(heads),
                    source_at=(heads.start - shard_heads(source, source_tp, kv_heads).start) * head_bytes,
                    destination_at=(heads.start - wanted.start) * head_bytes,
                    size_bytes=len(heads) * head_bytes,
                )
            )
    return tuple(slices)


def _runs(destination: int, wanted: range, source_tp: int, kv_heads: int) -> list[tuple[int, range]]:
    """Split the wanted heads into runs that one source shard holds, each with that source."""
    runs: list[tuple[int, range]] = []
    for head in wanted:
        holders = [r for r in range(source_tp) if head in shard_heads(r, source_tp, kv_heads)]
        source = holders[destination % len(holders)]
        if runs and runs[-1][0] == source:
            runs[-1] = (source, range(runs[-1][1].start, head + 1))
        else:
            runs.append((source, range(head, head + 1)))
    return runs
