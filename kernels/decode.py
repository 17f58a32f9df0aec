"""Attention of few query rows per sequence over its pages: cut into work items, then combined.

One program holds a tile of query rows of one kv head and walks one item (`decode_plan.py`), page by page.

Legend: see `cache_view.py`; here W work items, R query rows of a tile (row = token * group + head in group).
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels import cpu
from quire.kernels._combine import combine_items
from quire.kernels._decode_dots import accumulate, load_queries, logits, store_output
from quire.kernels._transform import transform_query
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
from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.decode_plan import DecodePlan, decode_kind, decode_tile, plan_items


def decode_attention(
    cache: LayerCache,
    q_TQD: Tensor,
    batch: PagedBatch,
    spec: AttentionSpec,
    plan: DecodePlan | None = None,
    *,
    transformed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Causal attention of each sequence's last rows over all its pages: [T, Q, D] of `dtype` (None: q's).

    Correct for any number of rows, fast for few (8 and fewer). Rows of no sequence are undefined.
    plan: `plan_items` of this batch's lengths and this layer's kind, on the device; a CPU needs none. Without
    one the lengths are fetched from the device, which blocks: for tests and single calls.
    transformed: `q_TQD` is what `write.write_step` returned for this layer.
    Raises FormatError where the stored format cannot serve this attention. Source: `ref.paged.attend_ref`.
    """
    spec.check(cache)
    dtype = q_TQD.dtype if dtype is None else dtype
    if q_TQD.device.type == "cpu":
        return cpu.attend(cache, q_TQD, batch, spec).to(dtype)
    if plan is None:
        multiprocessors = torch.cuda.get_device_properties(q_TQD.device).multi_processor_count
        plan = plan_batch(cache, q_TQD.shape[1], batch, spec, multiprocessors)
    if not transformed:
        q_TQD = transform_query(cache.k_transform, q_TQD)
    return launch_decode(cache, q_TQD, batch, spec, plan, dtype)


def plan_batch(
    cache: LayerCache, query_heads: int, batch: PagedBatch, spec: AttentionSpec, multiprocessors: int
) -> DecodePlan:
    """Plan one layer's decode of a batch, whose lengths are fetched from its device."""
    kind = decode_kind(cache, query_heads, spec, batch.max_query_tokens, multiprocessors)
    query_tokens_S = batch.query_start_S1.diff().cpu().numpy()
    return plan_items(kind, query_tokens_S, batch.kv_tokens_S.cpu().numpy()).to(batch.kv_tokens_S.device)


def launch_decode(
    cache: LayerCache,
    q_TQD: Tensor,
    batch: PagedBatch,
    spec: AttentionSpec,
    plan: DecodePlan,
    dtype: torch.dtype,
) -> Tensor:
    """Attend item by item, then combine the items and transform V. `q_TQD` is in the keys' space, contiguous
    along D. The memory of partial results depends on the plan's size, not on lengths."""
    items, rows, (tokens, query_heads, head_dim) = len(plan.items_W4), batch.max_query_tokens, q_TQD.shape
    partial_WTQD = q_TQD.new_empty((items, rows, query_heads, head_dim), dtype=torch.float32)
    lse_WTQ = q_TQD.new_empty((items, rows, query_heads), dtype=torch.float32)
    _launch_attend(cache, q_TQD, batch, spec, plan, partial_WTQD, lse_WTQ)
    out_TQD = q_TQD.new_empty((tokens, query_heads, head_dim), dtype=dtype)
    combine_items(cache.v_transform, partial_WTQD, lse_WTQ, plan.first_item_S1, batch.query_start_S1, out_TQD)
    return out_TQD


def _launch_attend(
    cache: LayerCache,
    q_TQD: Tensor,
    batch: PagedBatch,
    spec: AttentionSpec,
    plan: DecodePlan,
    partial_WTQD: Tensor,
    lse_WTQ: Tensor,
) -> None:
    """Fill `partial_WTQD` with every item's normalized results and `lse_WTQ` with their base-2 log-sum-exp.

    T is the token's number within its sequence.
    """
    layout, cell, fmt = cache.layout, cache.cell, cache.format
    head_dim = check_head_dim(cache)
    group = q_TQD.shape[1] // layout.kv_heads
    tile = decode_tile(cache, q_TQD.shape[1], batch.max_query_tokens)
    row_tiles = triton.cdiv(batch.max_query_tokens * group, tile.rows)
    asm, fp8_native = instructions(q_TQD.device)
    decode_kernel[(row_tiles, layout.kv_heads, len(plan.items_W4))](
        q_TQD,
        cache.pool_NB,
        plan.items_W4,
        batch.page_table_SM,
        batch.query_start_S1,
        batch.kv_tokens_S,
        partial_WTQD,
        lse_WTQ,
        spec.scale * LOG2E,
        spec.window or 0,
        spec.softcap or 0.0,
        layout.page_bytes,
        layout.head_bytes,
        cell.k_codes,
        batch.page_table_SM.stride(0),
        q_TQD.stride(0),
        q_TQD.stride(1),
        batch.max_query_tokens,
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
        R=tile.rows,
        D=head_dim,
        P=layout.page_tokens,
        ASM=asm,
        FP8_NATIVE=fp8_native,
        num_warps=tile.warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["window", "max_tokens"])
def decode_kernel(
    q_ptr,
    pool_ptr,
    items_ptr,
    page_table_ptr,
    query_start_ptr,
    kv_tokens_ptr,
    partial_ptr,
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
    max_tokens,
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
    """Grid (row tiles, kv heads, items): tiles that read the same pages run side by side.

    A softmax is kept per row, in base 2.
    """
    item_ptr = items_ptr + tl.program_id(2) * 4
    seq, first_page = tl.load(item_ptr), tl.load(item_ptr + 1)
    end_page, place = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
    if seq < 0:
        return
    head = tl.program_id(1)
    page_table_ptr += seq * page_table_stride
    first_token = tl.load(query_start_ptr + seq)
    new_tokens = tl.load(query_start_ptr + seq + 1) - first_token
    kv_tokens = tl.load(kv_tokens_ptr + seq)
    first_row = tl.program_id(0) * R
    if WINDOW:
        first_seen = kv_tokens - new_tokens + first_row // G - window + 1
        first_page = tl.maximum(first_page, tl.maximum(first_seen, 0) // P)
    # Loaded before the lengths have arrived; where nothing is left to walk, it is still a page of the item.
    page = tl.load(page_table_ptr + tl.minimum(first_page, end_page - 1)).to(tl.int64)
    if first_row >= new_tokens * G:
        return
    row_R = first_row + tl.arange(0, R)
    token_R, q_head_R = row_R // G, head * G + row_R % G
    used_R = token_R < new_tokens
    seen_to_R = kv_tokens - new_tokens + token_R  # the row's own position, the last it sees
    last_token = tl.minimum((first_row + R - 1) // G, new_tokens - 1)
    end_page = tl.minimum(end_page, (kv_tokens - new_tokens + last_token) // P + 1)

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
    cell_ptr = pool_ptr + (page * page_bytes + head * head_bytes + layer_at)
    # Scales are too narrow for asynchronous copies: they are loaded one page ahead, into registers.
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
        # Probabilities (and sum_R) are 2**6 too high: times a small V scale they stay normal in fp16.
        prob_PR = tl.exp2(logit_PR - (new_top_R - 6.0)[None, :])
        sum_R = sum_R * decay_R + tl.sum(prob_PR, 0)
        top_R = new_top_R

        acc = accumulate(acc, v_codes, prob_PR, decay_R, v_words, written_P, VC, VG, ASM, FP8_NATIVE)
        k_words = load_scales(next_ptr + K_SCALES, token_P, KC, KG, P)
        v_words = load_scales(next_ptr + V_SCALES, token_P, VC, VG, P)
        cell_ptr = next_ptr

    place_R = place.to(tl.int64) * (max_tokens * (H * G)) + token_R * (H * G) + q_head_R
    store_output(partial_ptr + place_R * D, acc, 1.0 / tl.maximum(sum_R, 1e-30), used_R, VC, VG, D)
    lse_R = tl.where(sum_R > 0, top_R + tl.log2(tl.maximum(sum_R, 1e-30)), float("-inf"))
    tl.store(lse_ptr + place_R, lse_R, mask=used_R)
