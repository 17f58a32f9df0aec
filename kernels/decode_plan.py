"""How decode attention cuts a step's pages into work items: made on the host, which knows all lengths.

An item is a run of one sequence's pages. A program per item, kv head and tile of query rows walks it, the
largest items first. A plan is padded to a size in device memory, so that one captured launch serves
batches of any lengths. Knows numbers, no kernels.

Legend: see `cache_view.py`; here W work items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.kernels.cache_view import AttentionSpec, LayerCache
from quire.kernels.formats import Codes

Ints = npt.NDArray[np.integer[Any]]

_ROWS, _MORE_ROWS, _MOST_ROWS = 8, 16, 32  # 8 are the least a dot takes
_MOST_CHANNELS = 128  # more leave registers for the fewest rows only
_ONE_WARP_NUMBERS = 128 * 64  # of one side of a page: what one warp holds in registers
_WARPS_PER_MULTIPROCESSOR = 8  # that is what registers allow
_MIN_ITEM_PAGES = 2  # so that an item is more than a program's start and end
_START_PAGES = 1  # and what these take, in pages' time


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Query rows (token * group + head in group) that a program holds, and its warps."""

    rows: int
    warps: int


def decode_tile(cache: LayerCache, query_heads: int, max_query_tokens: int) -> DecodeTile:
    """Choose the widest tile that pays, up to the rows there are.

    Every tile reads the pages again, so bf16 takes as many rows as registers hold. Codes are read from the
    cache the second time, and two narrow tiles dequantize them faster than a wide one, as measured.
    """
    layout, codes = cache.layout, {cache.format.k.codes, cache.format.v.codes}
    rows = max_query_tokens * (query_heads // layout.kv_heads)
    if rows <= _ROWS or layout.head_dim > _MOST_CHANNELS or codes != {Codes.BF16}:
        tile_rows = _ROWS
    else:
        tile_rows = _MORE_ROWS if rows <= _MORE_ROWS else _MOST_ROWS
    wide = Codes.BF16 in codes or layout.head_dim * layout.page_tokens > _ONE_WARP_NUMBERS
    # Never 4 warps: a warpgroup would select wgmma, which wants its codes byte by byte.
    return DecodeTile(tile_rows, 2 if wide else 1)


@dataclass(frozen=True, slots=True)
class DecodeKind:
    """Everything but the lengths that a plan depends on: layers of one kind share their plan of a step."""

    page_tokens: int
    window: int | None
    fitting: int
    """Items that the device works on at the same time, all heads and row tiles of each; 1 or more."""


def decode_kind(
    cache: LayerCache, query_heads: int, spec: AttentionSpec, max_query_tokens: int, multiprocessors: int
) -> DecodeKind:
    """The kind of a layer's decode attention on a device with this many multiprocessors."""
    kv_heads, tile = cache.layout.kv_heads, decode_tile(cache, query_heads, max_query_tokens)
    row_tiles = -(-max_query_tokens * (query_heads // kv_heads) // tile.rows)
    programs = multiprocessors * _WARPS_PER_MULTIPROCESSOR // tile.warps
    return DecodeKind(cache.layout.page_tokens, spec.window, max(1, programs // (kv_heads * row_tiles)))


@dataclass(frozen=True, eq=False, slots=True)
class DecodePlan:
    """The work items of one step's batch, on any device."""

    items_W4: Tensor
    """int32, in the order in which they start: sequence, first page, end page (pages of the sequence, not of
    the pool), place. Sequence -1 marks unused items, which come last: empty programs between full ones upset
    how a device spreads them."""
    first_item_S1: Tensor
    """int32 [S + 1]: sequence s owns the places first_item[s] .. first_item[s + 1], in page order."""

    def to(self, device: torch.device | str) -> DecodePlan:
        return DecodePlan(self.items_W4.to(device), self.first_item_S1.to(device))


def items_capacity(kind: DecodeKind, sequences: int) -> int:
    """Return how many items suffice for every batch of up to `sequences`, whatever their lengths."""
    return max(2 * kind.fitting, sequences + kind.fitting)


def plan_items(
    kind: DecodeKind, query_tokens_S: Ints, kv_tokens_S: Ints, capacity: int | None = None
) -> DecodePlan:
    """Cut the pages that some query row sees into items about as long as each other; padded to `capacity`.

    One wave of items or two, whichever takes less time: two even out lengths, one starts fewer programs. A
    sequence without query rows or without tokens owns no items. Pure.
    Raises ValueError if `capacity` is below the number of sequences that own items.
    """
    first_page_S, pages_S = _seen_pages(kind, query_tokens_S, kv_tokens_S)
    owners = int(np.count_nonzero(pages_S))
    most = items_capacity(kind, owners) if capacity is None else capacity
    if most < owners:
        raise ValueError(
            f"{owners} sequences need as many work items, got a capacity of {most}; "
            "items_capacity() tells how many suffice"
        )
    waves = [n * kind.fitting for n in (1, 2) if n * kind.fitting >= owners]
    if len(waves) < 2:  # more sequences than fit at once: those that are too long are cut all the same
        waves.append(owners + kind.fitting)
    cuts = [_cut(pages_S, min(budget, most)) for budget in waves]
    items_S = min(cuts, key=lambda items_S: _makespan(pages_S, items_S, kind.fitting))
    return _lay_out(first_page_S, pages_S, items_S, capacity)


def _seen_pages(kind: DecodeKind, query_tokens_S: Ints, kv_tokens_S: Ints) -> tuple[Ints, Ints]:
    """Find the first page and number of pages of each sequence that any of its query rows sees."""
    end_S = -(-kv_tokens_S // kind.page_tokens)
    first_S = np.zeros_like(end_S)
    if kind.window:
        first_seen_S = kv_tokens_S - query_tokens_S - kind.window + 1  # by the first of its rows
        first_S = np.maximum(first_seen_S, 0) // kind.page_tokens
    return first_S, (end_S - first_S) * (query_tokens_S > 0)


def _cut(pages_S: Ints, budget: int) -> Ints:
    """Count the items of each sequence for the shortest item length that needs at most `budget` in all.

    `budget` is one for each sequence with pages, or more.
    """
    total, owners = int(pages_S.sum()), int(np.count_nonzero(pages_S))
    low = max(_MIN_ITEM_PAGES, -(-total // max(1, budget)))
    high = max(low, int(pages_S.max(initial=0)))
    if budget > owners:  # this length is enough: rounding up adds less than one item a sequence
        high = max(low, min(high, -(-total // (budget - owners))))
    while low < high:
        middle = (low + high) // 2
        if int(((pages_S + (middle - 1)) // middle).sum()) <= budget:
            high = middle
        else:
            low = middle + 1
    return (pages_S + (low - 1)) // low


def _makespan(pages_S: Ints, items_S: Ints, fitting: int) -> int:
    """Estimate when the last item ends, in pages' time, if free places take the largest item left."""
    some_S = np.maximum(items_S, 1)
    short_S, longer_S = pages_S // some_S, pages_S % some_S
    size_W = np.repeat(np.concatenate([short_S + 1, short_S]), np.concatenate([longer_S, items_S - longer_S]))
    size_W[::-1].sort()  # descending
    load = np.zeros(fitting, dtype=np.int64)
    for at in range(0, len(size_W), fitting):
        wave = size_W[at : at + fitting]
        load.sort()  # the least loaded places take the largest
        load[: len(wave)] += wave + _START_PAGES
    return int(load.max())


def _lay_out(first_page_S: Ints, pages_S: Ints, items_S: Ints, capacity: int | None) -> DecodePlan:
    """Spread each sequence's pages evenly over its items."""
    first_item_S1 = np.zeros(len(items_S) + 1, dtype=np.int32)
    np.cumsum(items_S, out=first_item_S1[1:])
    used = int(first_item_S1[-1])
    seq_W = np.repeat(np.arange(len(items_S)), items_S)
    place_W = np.arange(used)
    nth_W = place_W - first_item_S1[seq_W]
    pages_W, items_W, first_page_W = pages_S[seq_W], items_S[seq_W], first_page_S[seq_W]
    first_W = pages_W * nth_W // items_W
    end_W = pages_W * (nth_W + 1) // items_W
    order_W = np.argsort(first_W - end_W, kind="stable")
    items_W4 = np.full((max(1, used) if capacity is None else capacity, 4), -1, dtype=np.int32)
    columns = (seq_W, first_page_W + first_W, first_page_W + end_W, place_W)
    items_W4[:used] = np.stack(columns, 1)[order_W]
    return DecodePlan(torch.from_numpy(items_W4), torch.from_numpy(first_item_S1))
