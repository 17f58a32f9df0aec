"""The static transform (`transform.py`) of queries and outputs on a GPU, and its rotation inside kernels.

A rotation multiplies by a matrix of +1 and -1 and then by 1 / sqrt(D). Those signs are exact in bf16, so the
tensor cores may do it without losing a bit: numbers enter as a sum of bf16 terms (one if they were bf16,
three for fp32's 24 bits), products are exact and sums are fp32.

Legend: see `cache_view.py`; here T rows of a tile (row = token * query heads + head), C half the channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.transform import SideTransform, hadamard

_TILE_ROWS = 16
_MANY_ROWS = 1 << 15  # enough programs for wider tiles, which load the rotation less often
_WIDE_TILE_ROWS = 64


def changes_query(transform: SideTransform) -> bool:
    """Tell whether `transform_query` changes Q: a shift of K does not."""
    return transform.rotate or transform.scale_HD is not None


def transform_query(transform: SideTransform, q_TQD: Tensor) -> Tensor:
    """Apply `transform.query` in one launch: fp32 [T, Q, D], or q itself where there is nothing to do."""
    if not changes_query(transform):
        return q_TQD if q_TQD.stride(2) == 1 else q_TQD.contiguous()
    out_TQD = q_TQD.new_empty(q_TQD.shape, dtype=torch.float32)
    return transform_query_into(transform, q_TQD, out_TQD)


def transform_query_into(transform: SideTransform, q_TQD: Tensor, out_TQD: Tensor) -> Tensor:
    """Write `transform.query` to `out_TQD`, contiguous and of any type; what fp16 cannot hold saturates."""
    return _launch(transform, q_TQD, out_TQD, of_query=True)


def transform_output(transform: SideTransform, o_TQD: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply `transform.output` in one launch, as `dtype`; or return o itself where there is nothing to do."""
    if transform.identity and o_TQD.dtype == dtype:
        return o_TQD
    return _launch(transform, o_TQD, o_TQD.new_empty(o_TQD.shape, dtype=dtype), of_query=False)


def bf16_terms(dtype: torch.dtype, affine: bool) -> int:
    """Count the bf16 numbers whose sum is a number of `dtype`, after shift and scale if `affine`."""
    return 3 if affine or dtype == torch.float32 else 2 if dtype == torch.float16 else 1


@lru_cache(maxsize=64)
def rotation_signs(head_dim: int, device: torch.device) -> Tensor:
    """Return `transform.hadamard` without its factor: bf16 [D, D] of +1 and -1."""
    return hadamard(head_dim, device).sign().bfloat16()


def _launch(transform: SideTransform, x_TQD: Tensor, out_TQD: Tensor, *, of_query: bool) -> Tensor:
    x_TQD = x_TQD if x_TQD.stride(2) == 1 else x_TQD.contiguous()
    tokens, query_heads, head_dim = x_TQD.shape
    scale_HD, shift_HD = transform.scale_HD, None if of_query else transform.shift_HD
    per_head = scale_HD if scale_HD is not None else shift_HD
    rows = tokens * query_heads
    tile_rows = _TILE_ROWS if rows < _MANY_ROWS else _WIDE_TILE_ROWS
    _transform_kernel[(triton.cdiv(rows, tile_rows),)](
        x_TQD,
        out_TQD,
        scale_HD,
        shift_HD,
        rotation_signs(head_dim, x_TQD.device) if transform.rotate else None,
        rows,
        x_TQD.stride(0),
        x_TQD.stride(1),
        QUERY=of_query,
        SCALE=scale_HD is not None,
        SHIFT=shift_HD is not None,
        ROTATE=transform.rotate,
        TERMS=bf16_terms(x_TQD.dtype, of_query and scale_HD is not None),
        Q=query_heads,
        G=1 if per_head is None else query_heads // per_head.shape[0],
        D=head_dim,
        T=tile_rows,
        num_warps=4,
    )
    return out_TQD


@triton.jit(do_not_specialize=["rows"])
def _transform_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    shift_ptr,
    signs_ptr,
    rows,
    stride_t,
    stride_h,
    QUERY: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROTATE: tl.constexpr,
    TERMS: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """Scale, then rotate a query; rotate, then scale and shift an output."""
    row_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    inside_T = row_T < rows
    head_T = row_T % Q
    kv_head_T = head_T // G
    channel_D, channel_C = tl.arange(0, D), tl.arange(0, D // 2)
    ptr_T = x_ptr + (row_T // Q) * stride_t + head_T * stride_h
    x_TD = tl.load(ptr_T[:, None] + channel_D[None, :], mask=inside_T[:, None], other=0.0).to(tl.float32)
    if QUERY and SCALE:
        x_TD *= _per_head(scale_ptr, kv_head_T, channel_D, inside_T, D)
    if ROTATE:
        for half in tl.static_range(2):
            at_C = channel_C + half * (D // 2)
            x_TC = rotated(x_TD, signs_ptr, at_C, TERMS, D)
            if not QUERY:
                x_TC = rescaled(x_TC, scale_ptr, shift_ptr, kv_head_T, at_C, inside_T, SCALE, SHIFT, D)
            _store_rows(out_ptr + row_T[:, None] * D + at_C[None, :], x_TC, inside_T)
    else:
        if not QUERY:
            x_TD = rescaled(x_TD, scale_ptr, shift_ptr, kv_head_T, channel_D, inside_T, SCALE, SHIFT, D)
        _store_rows(out_ptr + row_T[:, None] * D + channel_D[None, :], x_TD, inside_T)


@triton.jit
def _store_rows(ptr_TC, x_TC, inside_T):
    if ptr_TC.dtype.element_ty == tl.float16:
        x_TC = tl.clamp(x_TC, -65504.0, 65504.0)
    tl.store(ptr_TC, x_TC, mask=inside_T[:, None])


@triton.jit
def rotated(x_TD, signs_ptr, channel_C, TERMS: tl.constexpr, D: tl.constexpr):
    """Compute the given channels of x R, fp32 [T, C]."""
    signs_DC = tl.load(signs_ptr + tl.arange(0, D)[:, None] * D + channel_C[None, :])
    term_TD = x_TD.to(tl.bfloat16)
    sum_TC = tl.dot(term_TD, signs_DC)
    for _ in tl.static_range(TERMS - 1):
        x_TD -= term_TD.to(tl.float32)
        term_TD = x_TD.to(tl.bfloat16)
        sum_TC = tl.dot(term_TD, signs_DC, sum_TC)
    return sum_TC * (D**-0.5)


@triton.jit
def rescaled(
    x_TC,
    scale_ptr,
    shift_ptr,
    kv_head_T,
    channel_C,
    inside_T,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
):
    if SCALE:
        x_TC *= _per_head(scale_ptr, kv_head_T, channel_C, inside_T, D)
    if SHIFT:
        x_TC += _per_head(shift_ptr, kv_head_T, channel_C, inside_T, D)
    return x_TC


@triton.jit
def _per_head(ptr, kv_head_T, channel_C, inside_T, D: tl.constexpr):
    ptr_TC = ptr + kv_head_T[:, None] * D + channel_C[None, :]
    return tl.load(ptr_TC, mask=inside_T[:, None], other=0.0)
