"""Blocks move between any two tensor-parallel sizes as byte ranges of their heads."""

from __future__ import annotations

import pytest

from quire.kvstore.peers.slices import page_slices, shard_heads

PAIRS = [(s, d, h) for h in (1, 2, 4, 8) for s in (1, 2, 4, 8) for d in (1, 2, 4, 8)]
HEAD = 3


def shard_page(block: bytes, rank: int, tp: int, heads: int) -> bytes:
    return b"".join(block[h * HEAD : (h + 1) * HEAD] for h in shard_heads(rank, tp, heads))


@pytest.mark.parametrize(("source_tp", "destination_tp", "heads"), PAIRS)
def test_every_byte_of_every_destination_comes_from_a_shard_that_has_it(source_tp, destination_tp, heads):
    block = bytes(range(heads * HEAD))
    sources = [shard_page(block, r, source_tp, heads) for r in range(source_tp)]
    wanted = [shard_page(block, r, destination_tp, heads) for r in range(destination_tp)]
    got = [bytearray(b"\xff" * len(page)) for page in wanted]
    written = [0] * destination_tp
    for s in page_slices(source_tp, destination_tp, heads, HEAD):
        data = sources[s.source][s.source_at : s.source_at + s.size_bytes]
        assert len(data) == s.size_bytes == s.heads * HEAD
        assert data == block[s.first_head * HEAD :][: s.size_bytes]
        got[s.destination][s.destination_at : s.destination_at + s.size_bytes] = data
        written[s.destination] += s.size_bytes
    assert [bytes(page) for page in got] == wanted
    assert written == [len(page) for page in wanted]  # nothing is sent twice


@pytest.mark.parametrize(("source_tp", "destination_tp", "heads"), PAIRS)
def test_two_ranks_share_at_most_one_slice(source_tp, destination_tp, heads):
    pairs = [(s.source, s.destination) for s in page_slices(source_tp, destination_tp, heads, HEAD)]
    assert len(set(pairs)) == len(pairs)


def test_shards_that_hold_the_same_head_take_turns():
    sources = [s.source for s in page_slices(8, 8, 2, HEAD)]
    assert sorted(sources) == list(range(8))


def test_sizes_that_fit_no_cut_are_refused():
    with pytest.raises(ValueError, match="tp=3 neither divides 8 kv heads"):
        shard_heads(0, 3, 8)


def test_heads_are_cut_as_the_weights_are():
    """`replicas/model/tensor_parallel.py` gives rank r of tp the piece r * pieces // tp of the kv heads."""
    for tp, heads in [(1, 2), (2, 2), (4, 2), (8, 2), (2, 8), (4, 4)]:
        pieces = min(tp, heads)
        size = heads // pieces
        for rank in range(tp):
            start = rank * pieces // tp * size
            assert shard_heads(rank, tp, heads) == range(start, start + size)
