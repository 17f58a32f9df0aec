"""Attention of a chunk of new tokens over its sequence's pages, its own among them.

One program holds a tile of query rows of one kv head and walks every page they see, page by page. The codes
of a page become fp16 numbers once per tile; many rows share that work, so the rest is plain flash attention.
One long chunk is faster over dequantized pages: `prefill_library.py`.

Legend: see `cache_view.py`; here R query rows of a tile (row = token * group + head in group), W channels of
a piece (see `_triton.py`).
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels import cpu
from quire.kernels._transform import transform_output, transform_query
from quire.kernels._triton import (
    LOG2E,
    check_head_dim,
    first_channel,
    groups_of,
    instructions,
    load_codes,
    load_scales,
    pieces,
    softcap_base2,
)
from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.dequantize import dequantize_piece
from quire.kernels.prefill_library import attend_dequantized, suits_library


def prefill_attention(cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Causal attention of each sequence's last rows over all its pages: [T, Q, D] of q's type.

    The chunk attends to its own K and V as they were quantized. Rows of no sequence are undefined.
    Raises FormatError where the stored format cannot serve this attention. Source: `ref.paged.attend_ref`.
    """
    spec.check(cache)
    if q_TQD.device.type == "cpu":
        return cpu.attend(cache, q_TQD, batch, spec)
    if suits_library(cache, q_TQD, batch, spec):
        return attend_dequantized(cache, q_TQD, batch, spec)
    return launch_prefill(cache, q_TQD, batch, spec)


def launch_prefill(
    cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec, rows: int = 64, warps: int = 4
) -> Tensor:
    """Transform Q, attend in tiles of `rows` (a power of two), transform the output."""
    layout, cell, fmt = cache.layout, cache.cell, cache.format
    head_dim = check_head_dim(cache)
    q = transform_query(cache.k_transform, q_TQD)
    out_TQD = q.new_empty(q.shape, dtype=q_TQD.dtype if cache.v_transform.identity else torch.float32)
    group = q.shape[1] // layout.kv_heads
    asm, fp8_native = instructions(q.device)
    row_tiles = triton.cdiv(batch.max_query_tokens * group, rows)
    prefill_kernel[(row_tiles, layout.kv_heads, batch.sequences)](
        q,
        cache.pool_NB,
        batch.page_table_SM,
        batch.query_start_S1,
        batch.kv_tokens_S,
        out_TQD,
        spec.scale * LOG2E,
        spec.window or 0,
        spec.softcap or 0.0,
        layout.page_bytes,
        layout.head_bytes,
        cell.k_codes,
        batch.page_table_SM.stride(0),
        q.stride(0),
        q.stride(1),
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
        R=rows,
        D=head_dim,
        P=layout.page_tokens,
        ASM=asm,
        FP8_NATIVE=fp8_native,
        num_warps=warps,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return transform_output(cache.v_transform, out_TQD, q_TQD.dtype)


@triton.jit(do_not_specialize=["window"])
def prefill_kernel(
    q_ptr,
    pool_ptr,
    page_table_ptr,
    query_start_ptr,
    kv_tokens_ptr,
    out_ptr,
    scale_log2e,
    window,
    softcap,
    page_bytes,
    head_bytes,
    layer_at,
    page_table_stride,
    q_stride_t,
    q_stride_h,
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
    """Grid (row tiles, kv heads, sequences). A softmax is kept per row, in base 2."""
    head, seq = tl.program_id(1), tl.program_id(2)
    first_token = tl.load(query_start_ptr + seq)
    new_tokens = tl.load(query_start_ptr + seq + 1) - first_token
    kv_tokens = tl.load(kv_tokens_ptr + seq)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * R  # the longest tiles start first
    if first_row >= new_tokens * G:
        return
    row_R = first_row + tl.arange(0, R)
    token_R, q_head_R = row_R // G, head * G + row_R % G
    used_R = token_R < new_tokens
    seen_to_R = kv_tokens - new_tokens + token_R  # the row's own position, the last it sees
    seen_from_R = seen_to_R - window + 1

    # Pages that some row sees in part are masked; those before `part_page` every row sees in full.
    first_seen_to = kv_tokens - new_tokens + first_row // G
    last_token = tl.minimum((first_row + R - 1) // G, new_tokens - 1)
    end_page = (kv_tokens - new_tokens + last_token) // P + 1
    first_page = 0
    part_page = (first_seen_to + 1) // P
    if WINDOW:
        first_page = tl.maximum(first_seen_to - window + 1, 0) // P
        part_page = first_page

    q = _load_rows(q_ptr + (first_token + token_R) * q_stride_t + q_head_R * q_stride_h, used_R, KC, KG, D)
    acc = ()
    for _ in tl.static_range(pieces(VC, VG)):
        acc = acc + (tl.zeros([R, D // pieces(VC, VG)], tl.float32),)
    # Finite, so that a row which sees nothing of a page leaves its sums alone: exp2(-inf - top) is 0.
    top_R = tl.full([R], -1e30, tl.float32)
    sum_R = tl.zeros([R], tl.float32)
    page_table_ptr += seq * page_table_stride
    pool_ptr += head.to(tl.int64) * head_bytes + layer_at
    token_P = tl.arange(0, P)
    for masked in tl.static_range(2):
        for i in tl.range(part_page if masked else first_page, end_page if masked else part_page):
            cell_ptr = pool_ptr + tl.load(page_table_ptr + i).to(tl.int64) * page_bytes
            at_P = i * P + token_P
            written_P = at_P < kv_tokens
            k_codes = load_codes(cell_ptr, written_P, KC, KG, D, P, False)
            v_codes = load_codes(cell_ptr + V_CODES, written_P, VC, VG, D, P, True)
            k_words = load_scales(cell_ptr + K_SCALES, token_P, KC, KG, P)
            v_words = load_scales(cell_ptr + V_SCALES, token_P, VC, VG, P)

            logit_RP = tl.zeros([R, P], tl.float32)
            for j in tl.static_range(pieces(KC, KG)):
                k_PW = dequantize_piece(k_codes, k_words, written_P, j, KC, KG, False, ASM, FP8_NATIVE)
                logit_RP = tl.dot(q[j], tl.trans(k_PW), logit_RP)
            logit_RP *= scale_log2e
            if SOFTCAP:
                logit_RP = softcap_base2(logit_RP, softcap)
            if masked:
                seen_RP = at_P[None, :] <= seen_to_R[:, None]
                if WINDOW:
                    seen_RP = seen_RP & (at_P[None, :] >= seen_from_R[:, None])
                logit_RP = tl.where(seen_RP, logit_RP, float("-inf"))
            new_top_R = tl.maximum(top_R, tl.max(logit_RP, 1))
            decay_R = tl.exp2(top_R - new_top_R)
            prob_RP = tl.exp2(logit_RP - new_top_R[:, None])
            sum_R = sum_R * decay_R + tl.sum(prob_RP, 1)
            top_R = new_top_R

            prob_RP = prob_RP.to(tl.bfloat16 if VC == "bf16" else tl.float16)
            new = ()
            for j in tl.static_range(pieces(VC, VG)):
                v = dequantize_piece(v_codes, v_words, written_P, j, VC, VG, True, ASM, FP8_NATIVE)
                new = new + (tl.dot(prob_RP, v if VC == "bf16" else tl.trans(v), acc[j] * decay_R[:, None]),)
            acc = new

    row_ptr_R = out_ptr + ((first_token + token_R) * (H * G) + q_head_R) * D
    channel_W = tl.arange(0, D // pieces(VC, VG))
    for j in tl.static_range(pieces(VC, VG)):
        ptr_RW = row_ptr_R[:, None] + (channel_W + first_channel(j, VC, VG, D))[None, :]
        tl.store(ptr_RW, acc[j] * (1.0 / tl.maximum(sum_R, 1e-30))[:, None], mask=used_R[:, None])


@triton.jit
def _load_rows(row_ptr_R, used_R, KC: tl.constexpr, KG: tl.constexpr, D: tl.constexpr):
    """Q in pieces as the dots with K's take them, each [R, W]."""
    channel_W = tl.arange(0, D // pieces(KC, KG))
    q = ()
    for i in tl.static_range(pieces(KC, KG)):
        ptr_RW = row_ptr_R[:, None] + (channel_W + first_channel(i, KC, KG, D))[None, :]
        x_RW = tl.load(ptr_RW, mask=used_R[:, None], other=0.0)
        if KC == "bf16":
            x_RW = x_RW.to(tl.bfloat16)
        else:
            x_RW = tl.clamp(x_RW.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
        q = q + (x_RW,)
    return q
