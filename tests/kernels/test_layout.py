"""Offsets, sizes and fingerprints of pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from side_formats import SIDES

from quire.kernels.cache_view import LayerCache
from quire.kernels.formats import Codes, FormatError, LayerFormat, layer_formats
from quire.kernels.layout import PAGE_TOKENS, PageLayout
from quire.kernels.ref.paged import write_kv_ref
from quire.kernels.transform import SideTransform

MIXED = (
    LayerFormat(SIDES["int8"], SIDES["int4"]),
    LayerFormat(SIDES["bf16"], SIDES["fp8"]),
    LayerFormat(SIDES["int4g32"], SIDES["int8c"]),
)


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_sections_follow_each_other_aligned_and_without_overlap(head_dim: int, page_tokens: int) -> None:
    formats = MIXED[:2] if head_dim % 64 else MIXED
    layout = PageLayout(formats, kv_heads=3, head_dim=head_dim, page_tokens=page_tokens)
    end = 0
    for cell, layer in zip(layout.cells, formats, strict=True):
        sections = [
            (cell.k_codes, layout.codes_bytes(layer.k)),
            (cell.k_scales, layout.scales_bytes(layer.k)),
            (cell.v_codes, layout.codes_bytes(layer.v)),
            (cell.v_scales, layout.scales_bytes(layer.v)),
        ]
        for start, size in sections:
            assert end <= start < end + 16
            assert start % 16 == 0
            end = start + size
        assert cell.end >= end
    assert layout.head_bytes % 128 == 0
    assert 0 <= layout.head_bytes - end < 128 + 16


def test_bytes_per_token_count_every_byte_of_a_page() -> None:
    layout = PageLayout(layer_formats("int4", 4), kv_heads=2, head_dim=128, page_tokens=64)
    assert layout.bytes_per_token * layout.page_tokens == layout.page_bytes
    assert layout.page_bytes == 2 * 4 * 2 * 64 * (64 + 4)  # heads, layers, sides, tokens, codes and scale


@pytest.mark.parametrize(("policy", "least"), [("int8", 1.96), ("int4", 3.7), ("fp8", 2.0)])
def test_a_quantized_pool_holds_so_many_times_the_tokens_of_bf16(policy: str, least: float) -> None:
    quantized, plain = (PageLayout(layer_formats(p, 28), 8, 128).bytes_per_token for p in (policy, "bf16"))
    assert plain / quantized >= least


@pytest.mark.parametrize("shards", [2, 4])
def test_a_shards_page_is_a_contiguous_byte_range_of_the_whole_page(shards: int) -> None:
    whole = PageLayout(MIXED, kv_heads=4, head_dim=64, page_tokens=32)
    part = replace(whole, kv_heads=4 // shards)
    pool_NB = torch.zeros(2, whole.page_bytes, dtype=torch.uint8)
    shard_pools = [torch.zeros(2, part.page_bytes, dtype=torch.uint8) for _ in range(shards)]
    slots_T = torch.randperm(64)[:50]
    for layer in range(len(MIXED)):
        k_THD, v_THD = torch.randn(2, 50, 4, 64)
        write_kv_ref(LayerCache(pool_NB, whole, layer), k_THD, v_THD, slots_T)
        for pool, k, v in zip(shard_pools, k_THD.chunk(shards, 1), v_THD.chunk(shards, 1), strict=True):
            write_kv_ref(LayerCache(pool, part, layer), k, v, slots_T)
    assert pool_NB.any()
    assert torch.equal(pool_NB, torch.cat(shard_pools, 1))


def test_the_fingerprint_is_that_of_every_shard() -> None:
    layout = PageLayout(MIXED, kv_heads=4, head_dim=64)
    assert len(layout.fingerprint) == 32
    assert replace(layout, kv_heads=1).fingerprint == layout.fingerprint


def test_the_fingerprint_changes_with_everything_that_changes_the_bytes() -> None:
    layout = PageLayout(MIXED, kv_heads=4, head_dim=64)
    others = [
        replace(layout, head_dim=128),
        replace(layout, page_tokens=32),
        replace(layout, layers=MIXED[:2]),
        replace(layout, layers=(MIXED[1], MIXED[0], MIXED[2])),
    ]
    for i, layer in enumerate(MIXED):
        for name, fmt in SIDES.items():
            for side in ("k", "v"):
                if getattr(layer, side) != SIDES[name]:
                    changed = (*MIXED[:i], replace(layer, **{side: fmt}), *MIXED[i + 1 :])
                    others.append(replace(layout, layers=changed))
    fingerprints = [other.fingerprint for other in others]
    assert layout.fingerprint not in fingerprints
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_tokens": 48}, "one of .16, 32, 64."),
        ({"head_dim": 72}, "72 is not a multiple of 16"),
        ({"head_dim": 0}, "multiple of 16"),
        ({"kv_heads": 0}, "at least one kv head"),
        ({"layers": ()}, "at least one kv head and one layer"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        replace(PageLayout(MIXED, kv_heads=4, head_dim=64), **change)  # type: ignore[arg-type]


def test_a_layout_says_which_codes_it_uses() -> None:
    layout = PageLayout(MIXED, kv_heads=4, head_dim=64)
    assert {codes for codes in Codes if layout.uses(codes)} == {Codes.INT8, Codes.INT4, Codes.BF16, Codes.FP8}


def test_a_pool_must_be_bytes_of_whole_pages() -> None:
    layout = PageLayout(MIXED, kv_heads=1, head_dim=64)
    for pool in (torch.zeros(2, layout.page_bytes), torch.zeros(2, layout.page_bytes + 1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=str(layout.page_bytes)):
            LayerCache(pool, layout, 0, SideTransform(), SideTransform())
