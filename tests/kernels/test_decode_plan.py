"""The cut of a step's pages into work items: all that is seen once, evenly, within the capacity."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from paged_cases import Case, make_step

from quire.kernels.cache_view import AttentionSpec
from quire.kernels.decode_plan import (
    DecodeKind,
    DecodePlan,
    DecodeTile,
    decode_kind,
    decode_tile,
    items_capacity,
    plan_items,
)

RNG = np.random.default_rng(0)
BATCHES = {
    "one": [131072],
    "one short": [1],
    "equal": [8192] * 64,
    "ragged": [256 + 250 * i for i in range(64)],
    "one long": [100_000, *[1000] * 31],
    "many": [8192] * 600,
    "many ragged": RNG.integers(1, 20_000, 300),
    "with idle ones": [0, 700, 0, 0, 3000],
    "page bounds": [63, 64, 65, 127, 128, 129],
    "none": [0, 0],
}


def ones(kv_tokens, query_tokens: int = 1):
    kv_tokens = np.array(kv_tokens)
    return np.minimum(query_tokens, kv_tokens), kv_tokens


def pages_of(plan: DecodePlan, sequence: int) -> list[int]:
    """All pages that the sequence's items walk, in the order of their places."""
    items = [i for i in plan.items_W4.tolist() if i[0] == sequence]
    return [page for _, first, end, _ in sorted(items, key=lambda i: i[3]) for page in range(first, end)]


@pytest.mark.parametrize("batch", BATCHES)
def test_every_page_that_a_row_sees_is_walked_once(batch):
    for fitting, query_tokens, window in product([1, 33, 132], [1, 5], [None, 1, 100, 4096]):
        new_S, kv_S = ones(BATCHES[batch], query_tokens)
        plan = plan_items(DecodeKind(64, window, fitting), new_S, kv_S)
        for s, (new, kv) in enumerate(zip(new_S.tolist(), kv_S.tolist(), strict=True)):
            first_seen = max(0, kv - new - window + 1) if window else 0
            seen = range(first_seen // 64, -(-kv // 64)) if new else []
            assert pages_of(plan, s) == list(seen), (fitting, query_tokens, window)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_sequences_places_are_its_own_and_in_page_order(batch):
    new_S, kv_S = ones(BATCHES[batch])
    plan = plan_items(DecodeKind(64, None, 132), new_S, kv_S)
    first_S1, used = plan.first_item_S1.tolist(), [i for i in plan.items_W4.tolist() if i[0] >= 0]
    assert sorted(place for *_, place in used) == list(range(first_S1[-1]))
    for sequence, first, end, place in used:
        assert first_S1[sequence] <= place < first_S1[sequence + 1]
        assert first < end


@pytest.mark.parametrize("fitting", [1, 33, 132])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_capacity_suffices_and_unused_items_come_last(batch, fitting):
    kind = DecodeKind(64, None, fitting)
    new_S, kv_S = ones(BATCHES[batch])
    capacity = items_capacity(kind, len(kv_S))
    padded, exact = plan_items(kind, new_S, kv_S, capacity), plan_items(kind, new_S, kv_S)
    assert len(padded.items_W4) == capacity
    sequence_W = padded.items_W4[:, 0].numpy()
    used = int((sequence_W >= 0).sum())
    assert (sequence_W[used:] == -1).all()
    assert used == padded.first_item_S1[-1]
    assert padded.items_W4[:used].tolist() == exact.items_W4[:used].tolist()
    assert len(exact.items_W4) == max(1, used)


def test_a_capacity_below_the_number_of_sequences_is_refused():
    with pytest.raises(ValueError, match="capacity of 5"):
        plan_items(DecodeKind(64, None, 4), *ones([100] * 6), capacity=5)


def test_any_sufficient_capacity_is_kept():
    for capacity in (6, 7, 40, 500):
        plan = plan_items(DecodeKind(64, None, 132), *ones([9000] * 6), capacity)
        assert len(plan.items_W4) == capacity


@pytest.mark.parametrize("batch", BATCHES)
def test_large_items_start_first_and_small_ones_are_rare(batch):
    new_S, kv_S = ones(BATCHES[batch])
    plan = plan_items(DecodeKind(64, None, 132), new_S, kv_S)
    size_W = (plan.items_W4[:, 2] - plan.items_W4[:, 1]).numpy()
    assert (np.diff(size_W) <= 0).all()
    lone_S = -(-kv_S // 64) == 1
    assert (size_W == 1).sum() <= lone_S.sum() + (-(-kv_S // 64) % 2 == 1).sum()


@pytest.mark.parametrize(
    ("batch", "limit"), [("one", 1.1), ("equal", 1.1), ("ragged", 1.15), ("one long", 1.25), ("many", 1.15)]
)
def test_the_device_is_busy_to_the_end(batch, limit):
    """Simulated: each place takes the next item as it is free."""
    new_S, kv_S = ones(BATCHES[batch])
    plan = plan_items(DecodeKind(64, None, 132), new_S, kv_S)
    busy_until = np.zeros(132)
    for sequence, first, end, _ in plan.items_W4.tolist():
        if sequence >= 0:
            busy_until[busy_until.argmin()] += end - first
    assert busy_until.max() <= limit * busy_until.mean()


@pytest.mark.parametrize(
    ("name", "head_dim", "rows", "tile"),
    [
        ("int4", 128, 1, DecodeTile(8, 1)),
        ("bf16", 128, 1, DecodeTile(8, 2)),
        ("int4", 256, 1, DecodeTile(8, 2)),
        ("int4", 128, 4, DecodeTile(8, 1)),
        ("int8", 128, 8, DecodeTile(8, 1)),
        ("bf16", 128, 4, DecodeTile(16, 2)),
        ("bf16", 128, 8, DecodeTile(32, 2)),
        ("fp8", 128, 8, DecodeTile(8, 1)),
        ("bf16", 256, 8, DecodeTile(8, 2)),
    ],
)
def test_tiles_are_as_wide_as_the_rows_and_the_registers(name, head_dim, rows, tile):
    step = make_step(Case(name, name, [1], [1], page_tokens=64, head_dim=head_dim))
    assert decode_tile(step.cache, 8, rows) == tile


def test_kinds_differ_by_what_changes_a_plan():
    step = make_step(Case("int8", "int8", [1], [1], kv_heads=2, group=4, page_tokens=64))
    bf16 = make_step(Case("bf16", "bf16", [1], [1], kv_heads=2, group=4, page_tokens=64))
    full, windowed = AttentionSpec(1.0), AttentionSpec(1.0, window=512)
    assert decode_kind(step.cache, 8, full, 1, 132) == DecodeKind(64, None, 132 * 8 // 2)
    assert decode_kind(step.cache, 8, windowed, 1, 132).window == 512
    assert decode_kind(step.cache, 8, full, 8, 132).fitting < 132 * 8 // 2
    assert decode_kind(bf16.cache, 8, full, 1, 132).fitting == 132 * 8 // 2 // 2  # two warps
    assert decode_kind(step.cache, 8, full, 1, 1).fitting == 4
    assert decode_kind(step.cache, 8, full, 1000, 1).fitting == 1
