"""Attention of few query rows per sequence over its pages: split over the pages, then combined.

One program holds a tile of query rows of one kv head and walks its share of the pages, a page a turn.

Legend: see `paged.py`; here R query rows of a tile (row = token * group + head in group), W channels of a
piece (see `_triton.py`), X splits.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels import cpu
from quire.kernels._combine import combine_splits
from quire.kernels._swapped import accumulate, load_queries, logits, store_output
from quire.kernels._transform import transform_output, transform_query
from quire.kernels._triton import (
    LOG2E,
    check_head_dim,
    groups_of,
    instructions,
    load_codes,
    load_scales,
    pieces,
    softcap_base2,
)
from quire.kernels.formats import Codes
from quire.kernels.paged import AttentionSpec, LayerCache, PagedBatch

ROWS = 8  # query rows of a tile, the least a dot takes; more tiles of it beat wider ones, which spill
_ONE_WARP_NUMBERS = 128 * 64  # of one side of a page: what one warp holds in registers
_WARPS_PER_MULTIPROCESSOR = 8  # that is what registers allow
_MIN_PAGES_PER_SPLIT = 2
_MAX_SPLITS = 128


def decode_attention(cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Causal attention of each sequence's last rows over all its pages: [T, Q, D] of q's type.

    Right for any number of rows, quick for few (8 and less). Rows of no sequence are undefined.
    Raises FormatError where the stored format cannot serve this attention. Source: `ref.paged.attend_ref`.
    """
    spec.check(cache)
    if q_TQD.device.type == "cpu":
        return cpu.attend(cache, q_TQD, batch, spec)
    multiprocessors = torch.cuda.get_device_properties(q_TQD.device).multi_processor_count
    tiling = plan_decode(cache, q_TQD.shape[1], batch, spec, multiprocessors)
    return launch_decode(cache, q_TQD, batch, spec, tiling)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch cuts the work."""

    splits: int
    """Programs that share one tile's pages; more than one leaves partial results to combine."""
    pages_per_split: int
    warps: int


def plan_decode(
    cache: LayerCache, query_heads: int, batch: PagedBatch, spec: AttentionSpec, multiprocessors: int
) -> Tiling:
    """Tiles that fill the device: pages are split into as many programs as run at the same time, not more,
    for a second wave that is part empty costs what a full one does. Pure.
    """
    layout, fmt = cache.layout, cache.format
    pages = triton.cdiv(batch.max_kv_tokens, layout.page_tokens)
    if spec.window:
        pages = min(pages, triton.cdiv(spec.window + batch.max_query_tokens - 2, layout.page_tokens) + 1)
    wide = (
        Codes.BF16 in (fmt.k.codes, fmt.v.codes) or layout.head_dim * layout.page_tokens > _ONE_WARP_NUMBERS
    )
    warps = 2 if wide else 1  # never 4: a warpgroup would select wgmma, which wants its codes byte by byte
    group = query_heads // layout.kv_heads
    programs = batch.sequences * layout.kv_heads * triton.cdiv(batch.max_query_tokens * group, ROWS)
    fitting = multiprocessors * _WARPS_PER_MULTIPROCESSOR // warps // programs
    splits = max(1, min(fitting, pages // _MIN_PAGES_PER_SPLIT, _MAX_SPLITS))
    pages_per_split = max(1, triton.cdiv(pages, splits))
    return Tiling(max(1, triton.cdiv(pages, pages_per_split)), pages_per_split, warps)


def launch_decode(
    cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec, tiling: Tiling
) -> Tensor:
    """Transform Q, attend in splits, combine them, transform the output."""
    dtype = q_TQD.dtype if cache.v_transform.identity else torch.float32
    q = transform_query(cache.k_transform, q_TQD)
    lse = q.new_empty((*q.shape[:2], tiling.splits), dtype=torch.float32)
    partial_dtype = dtype if tiling.splits == 1 else torch.float32
    partial = q.new_empty((*q.shape[:2], tiling.splits, q.shape[2]), dtype=partial_dtype)
    _launch_attend(cache, q, batch, spec, tiling, partial, lse)
    if tiling.splits == 1:
        return transform_output(cache.v_transform, partial.squeeze(2), q_TQD.dtype)
    return combine_splits(cache.v_transform, partial, lse, q_TQD.dtype)


def _launch_attend(
    cache: LayerCache,
    q_TQD: Tensor,
    batch: PagedBatch,
    spec: AttentionSpec,
    tiling: Tiling,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` [T, Q, splits, D] with normalized partial results and `lse` fp32 [T, Q, splits] with their
    base-2 log-sum-exp. `q_TQD` is transformed already and contiguous along D; `out` may be of any type.
    """
    layout, cell, fmt = cache.layout, cache.cell, cache.format
    head_dim = check_head_dim(cache)
    group = q_TQD.shape[1] // layout.kv_heads
    row_tiles = triton.cdiv(batch.max_query_tokens * group, ROWS)
    asm, fp8_native = instructions(q_TQD.device)
    decode_kernel[(row_tiles, batch.sequences * layout.kv_heads, tiling.splits)](
        q_TQD,
        cache.pool_NB,
        batch.page_table_SM,
        batch.query_start_S1,
        batch.kv_tokens_S,
        out,
        lse,
        spec.scale * LOG2E,
        spec.window or 0,
        spec.softcap or 0.0,
        layout.page_bytes,
        layout.head_bytes,
        cell.k_codes,
        batch.page_table_SM.stride(0),
        q_TQD.stride(0),
        q_TQD.stride(1),
        tiling.pages_per_split,
        K_SCALES=cell.k_scales - cell.k_codes,
        V_CODES=cell.v_codes - cell.k_codes,
        V_SCALES=cell.v_scales - cell.k_codes,
        KC=fmt.k.codes.value,
        VC=fmt.v.codes.value,
        KG=groups_of(fmt.k, head_dim),
        VG=groups_of(fmt.v, head_dim),
        WINDOW=bool(spec.window),
        SOFTCAP=bool(spec.softcap),
        H=layout.kv_heads,
        G=group,
        R=ROWS,
        D=head_dim,
        P=layout.page_tokens,
        ASM=asm,
        FP8_NATIVE=fp8_native,
        num_warps=tiling.warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["window", "pages_per_split"])
def decode_kernel(
    q_ptr,
    pool_ptr,
    page_table_ptr,
    query_start_ptr,
    kv_tokens_ptr,
    out_ptr,
    lse_ptr,
    scale_log2e,
    window,
    softcap,
    page_bytes,
    head_bytes,
    layer_at,
    page_table_stride,
    q_stride_t,
    q_stride_h,
    pages_per_split,
    K_SCALES: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALES: tl.constexpr,
    KC: tl.constexpr,
    VC: tl.constexpr,
    KG: tl.constexpr,
    VG: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    ASM: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    """Grid (row tiles, sequences * kv heads, splits): tiles that read the same pages run side by side.

    A softmax is kept per row, in base 2.
    """
    seq, head = tl.program_id(1) // H, tl.program_id(1) % H
    split, splits = tl.program_id(2), tl.num_programs(2)
    first_token = tl.load(query_start_ptr + seq)
    new_tokens = tl.load(query_start_ptr + seq + 1) - first_token
    kv_tokens = tl.load(kv_tokens_ptr + seq)
    first_row = tl.program_id(0) * R
    if first_row >= new_tokens * G:
        return
    row_R = first_row + tl.arange(0, R)
    token_R, q_head_R = row_R // G, head * G + row_R % G
    used_R = token_R < new_tokens
    seen_to_R = kv_tokens - new_tokens + token_R  # the row's own position, the last it sees

    # The pages this program walks: those that any of its rows sees, and of these its split's share.
    last_token = tl.minimum((first_row + R - 1) // G, new_tokens - 1)
    end_page = (kv_tokens - new_tokens + last_token) // P + 1
    first_page = 0
    if WINDOW:
        first_page = tl.maximum(kv_tokens - new_tokens + first_row // G - window + 1, 0) // P
    first_page += split * pages_per_split
    end_page = tl.minimum(end_page, first_page + pages_per_split)

    q, q_sum = load_queries(
        q_ptr + (first_token + token_R) * q_stride_t + q_head_R * q_stride_h, used_R, KC, KG, R, D
    )
    acc = ()
    for _ in tl.static_range(pieces(VC, VG)):
        acc = acc + (tl.zeros([D // pieces(VC, VG), R], tl.float32),)
    # Finite, so that a row which sees nothing of a page leaves its sums alone: exp2(-inf - top) is 0.
    top_R = tl.full([R], -1e30, tl.float32)
    sum_R = tl.zeros([R], tl.float32)

    token_P = tl.arange(0, P)
    page_table_ptr += seq * page_table_stride
    page = tl.load(page_table_ptr + first_page, mask=first_page < end_page, other=0).to(tl.int64)
    cell_ptr = pool_ptr + (page * page_bytes + head * head_bytes + layer_at)
    # Scales are too narrow for asynchronous copies: they travel one page ahead, in registers.
    k_words = load_scales(cell_ptr + K_SCALES, token_P, KC, KG, P)
    v_words = load_scales(cell_ptr + V_SCALES, token_P, VC, VG, P)
    for i in tl.range(first_page, end_page, num_stages=2):
        page = tl.load(page_table_ptr + i + 1, mask=i + 1 < end_page, other=0).to(tl.int64)
        next_ptr = pool_ptr + (page * page_bytes + head * head_bytes + layer_at)
        at_P = i * P + token_P
        written_P = at_P < kv_tokens
        k_codes = load_codes(cell_ptr, written_P, KC, KG, D, P, False)
        v_codes = load_codes(cell_ptr + V_CODES, written_P, VC, VG, D, P, True)

        logit_PR = logits(k_codes, q, q_sum, k_words, scale_log2e, KC, KG, P, R, ASM, FP8_NATIVE)
        if SOFTCAP:
            logit_PR = softcap_base2(logit_PR, softcap)
        seen_PR = at_P[:, None] <= seen_to_R[None, :]
        if WINDOW:
            seen_PR = seen_PR & (at_P[:, None] > seen_to_R[None, :] - window)
        logit_PR = tl.where(seen_PR, logit_PR, float("-inf"))
        new_top_R = tl.maximum(top_R, tl.max(logit_PR, 0))
        decay_R = tl.exp2(top_R - new_top_R)
        # Probabilities stand 2**6 too high (sum_R alike): times a small V scale they stay normal in fp16.
        prob_PR = tl.exp2(logit_PR - (new_top_R - 6.0)[None, :])
        sum_R = sum_R * decay_R + tl.sum(prob_PR, 0)
        top_R = new_top_R

        acc = accumulate(acc, v_codes, prob_PR, decay_R, v_words, written_P, VC, VG, ASM, FP8_NATIVE)
        k_words = load_scales(next_ptr + K_SCALES, token_P, KC, KG, P)
        v_words = load_scales(next_ptr + V_SCALES, token_P, VC, VG, P)
        cell_ptr = next_ptr

    place_R = ((first_token + token_R) * (H * G) + q_head_R) * splits + split
    store_output(out_ptr + place_R * D, acc, 1.0 / tl.maximum(sum_R, 1e-30), used_R, VC, VG, D)
    lse_R = tl.where(sum_R > 0, top_R + tl.log2(tl.maximum(sum_R, 1e-30)), float("-inf"))
    tl.store(lse_ptr + place_R, lse_R, mask=used_R)
