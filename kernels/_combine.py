"""Combining the partial results of a decode's work items into one, and V's transform of it.

Legend: see `cache_view.py`; here W work items, R query rows of a tile (row = token * query heads + head,
within a sequence), X items taken at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels._transform import rescaled, rotated, rotation_signs
from quire.kernels.transform import SideTransform

_TILE_NUMBERS = 1 << 14  # rows * items * channels in registers
_FEW_ITEMS, _MANY_ITEMS = 4, 128  # at once


def combine_items(
    transform: SideTransform,
    partial_WTQD: Tensor,
    lse_WTQ: Tensor,
    first_item_S1: Tensor,
    query_start_S1: Tensor,
    out_TQD: Tensor,
) -> None:
    """Sum each row's items, weighted by their base-2 log-sum-exp, then apply `transform.output`: one launch.

    Partial results are fp32; their T is the token's number within its sequence. A sequence without items
    gives what the transform makes of zeros; rows of no sequence are left alone.
    """
    items, max_tokens, query_heads, head_dim = partial_WTQD.shape
    sequences = first_item_S1.shape[0] - 1
    rows, at_once = combine_tile(items, sequences, head_dim)
    scale_HD, shift_HD = transform.scale_HD, transform.shift_HD
    per_head = scale_HD if scale_HD is not None else shift_HD
    combine_kernel[(triton.cdiv(max_tokens * query_heads, rows), sequences)](
        partial_WTQD,
        lse_WTQ,
        first_item_S1,
        query_start_S1,
        out_TQD,
        scale_HD,
        shift_HD,
        rotation_signs(head_dim, out_TQD.device) if transform.rotate else None,
        max_tokens,
        SCALE=scale_HD is not None,
        SHIFT=shift_HD is not None,
        ROTATE=transform.rotate,
        Q=query_heads,
        G=1 if per_head is None else query_heads // per_head.shape[0],
        D=head_dim,
        R=rows,
        X=at_once,
        num_warps=8,
    )


def combine_tile(items: int, sequences: int, head_dim: int) -> tuple[int, int]:
    """Choose the rows of a tile and the items taken at once: twice a sequence's average, as some own more.

    Few sequences get narrow tiles, to make many programs; many share the rotation's matrix among many rows.
    """
    at_once = max(_FEW_ITEMS, min(2 * items // sequences, _MANY_ITEMS, _TILE_NUMBERS // head_dim))
    at_once = 1 << (at_once.bit_length() - 1)
    return _TILE_NUMBERS // head_dim // at_once, at_once


@triton.jit(do_not_specialize=["max_tokens"])
def combine_kernel(
    partial_ptr,
    lse_ptr,
    first_item_ptr,
    query_start_ptr,
    out_ptr,
    scale_ptr,
    shift_ptr,
    signs_ptr,
    max_tokens,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROTATE: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
):
    """Grid (row tiles of a sequence, sequences)."""
    seq = tl.program_id(1)
    first_token = tl.load(query_start_ptr + seq)
    rows = (tl.load(query_start_ptr + seq + 1) - first_token) * Q
    first_item, end_item = tl.load(first_item_ptr + seq), tl.load(first_item_ptr + seq + 1)
    first_row = tl.program_id(0) * R
    if first_row >= rows:
        return
    row_R = first_row + tl.arange(0, R)
    inside_R = row_R < rows
    channel_D = tl.arange(0, D)
    top_R = tl.full([R], -1e30, tl.float32)  # finite: see `decode_kernel`
    sum_R = tl.zeros([R], tl.float32)
    out_RD = tl.zeros([R, D], tl.float32)
    for item in range(first_item, end_item, X):
        item_X = item + tl.arange(0, X)
        here_RX = inside_R[:, None] & (item_X < end_item)[None, :]
        at_RX = item_X.to(tl.int64)[None, :] * (max_tokens * Q) + row_R[:, None]
        lse_RX = tl.load(lse_ptr + at_RX, mask=here_RX, other=float("-inf"))
        at_RXD = at_RX[:, :, None] * D + channel_D[None, None, :]
        partial_RXD = tl.load(partial_ptr + at_RXD, mask=here_RX[:, :, None], other=0.0)
        new_top_R = tl.maximum(top_R, tl.max(lse_RX, 1))
        decay_R = tl.exp2(top_R - new_top_R)
        weight_RX = tl.exp2(lse_RX - new_top_R[:, None])
        sum_R = sum_R * decay_R + tl.sum(weight_RX, 1)
        out_RD = out_RD * decay_R[:, None] + tl.sum(partial_RXD * weight_RX[:, :, None], 1)
        top_R = new_top_R
    out_RD /= tl.maximum(sum_R, 1e-30)[:, None]
    kv_head_R = row_R % Q // G
    out_ptr_R = out_ptr + (first_token.to(tl.int64) * Q + row_R) * D
    if ROTATE:
        for half in tl.static_range(2):
            at_C = tl.arange(0, D // 2) + half * (D // 2)
            out_RC = rotated(out_RD, signs_ptr, at_C, 3, D)
            out_RC = rescaled(out_RC, scale_ptr, shift_ptr, kv_head_R, at_C, inside_R, SCALE, SHIFT, D)
            tl.store(out_ptr_R[:, None] + at_C[None, :], out_RC, mask=inside_R[:, None])
    else:
        out_RD = rescaled(out_RD, scale_ptr, shift_ptr, kv_head_R, channel_D, inside_R, SCALE, SHIFT, D)
        tl.store(out_ptr_R[:, None] + channel_D[None, :], out_RD, mask=inside_R[:, None])
