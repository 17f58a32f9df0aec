"""One result from the partial ones that the splits of a decode leave, and V's transform of it.

Legend: see `paged.py`; here R query rows of a tile (row = token * query heads + head), X splits.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels._transform import rescaled, rotated, rotation_signs, transform_output
from quire.kernels.transform import SideTransform

_FEW_SPLITS = 8  # so many results of a tile of rows fit in registers
_TILE_ROWS = 16  # the least a dot takes: the rotation is one


def combine_splits(
    transform: SideTransform, partial_TQXD: Tensor, lse_TQX: Tensor, dtype: torch.dtype
) -> Tensor:
    """Weighted by their base-2 log-sum-exp, then `transform.output`: [T, Q, D] of `dtype`.

    Splits of lse -inf have undefined numbers. One launch where splits are few, as in large batches.
    """
    tokens, heads, splits, head_dim = partial_TQXD.shape
    if splits <= _FEW_SPLITS and not transform.identity:
        return _launch_combine_transform(transform, partial_TQXD, lse_TQX, dtype)
    out_TQD = partial_TQXD.new_empty(
        (tokens, heads, head_dim), dtype=dtype if transform.identity else torch.float32
    )
    _combine_kernel[(tokens * heads,)](
        partial_TQXD, lse_TQX, out_TQD, splits, X=triton.next_power_of_2(splits), D=head_dim, num_warps=2
    )
    return transform_output(transform, out_TQD, dtype)


def _launch_combine_transform(
    transform: SideTransform, partial_TQXD: Tensor, lse_TQX: Tensor, dtype: torch.dtype
) -> Tensor:
    """Combined results after `transform.output`, [T, Q, D] of `dtype`; X splits, few."""
    tokens, heads, splits, head_dim = partial_TQXD.shape
    rows, device = tokens * heads, partial_TQXD.device
    out_TQD = partial_TQXD.new_empty((tokens, heads, head_dim), dtype=dtype)
    scale_HD, shift_HD = transform.scale_HD, transform.shift_HD
    per_head = scale_HD if scale_HD is not None else shift_HD
    combine_transform_kernel[(triton.cdiv(rows, _TILE_ROWS),)](
        partial_TQXD,
        lse_TQX,
        out_TQD,
        scale_HD,
        shift_HD,
        rotation_signs(head_dim, device) if transform.rotate else None,
        rows,
        splits,
        X=triton.next_power_of_2(splits),
        SCALE=scale_HD is not None,
        SHIFT=shift_HD is not None,
        ROTATE=transform.rotate,
        Q=heads,
        G=1 if per_head is None else heads // per_head.shape[0],
        D=head_dim,
        R=_TILE_ROWS,
        num_warps=8,
    )
    return out_TQD


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(partial_ptr, lse_ptr, out_ptr, splits, X: tl.constexpr, D: tl.constexpr):
    """One query row a program. Splits without a token have lse -inf and undefined numbers."""
    row = tl.program_id(0)
    split_X, channel_D = tl.arange(0, X), tl.arange(0, D)
    lse_X = tl.load(lse_ptr + row * splits + split_X, mask=split_X < splits, other=float("-inf"))
    weight_X = tl.exp2(lse_X - tl.maximum(tl.max(lse_X, 0), -1e30))
    at_XD = (row * splits + split_X)[:, None] * D + channel_D[None, :]
    partial_XD = tl.load(partial_ptr + at_XD, mask=(weight_X > 0)[:, None], other=0.0)
    out_D = tl.sum(partial_XD * weight_X[:, None], 0) / tl.maximum(tl.sum(weight_X, 0), 1e-30)
    tl.store(out_ptr + row * D + channel_D, out_D)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_transform_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    scale_ptr,
    shift_ptr,
    signs_ptr,
    rows,
    splits,
    X: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROTATE: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """R rows a program. What `_combine_kernel` does, then rotation, scale and shift of V's transform."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = row_R < rows
    channel_D = tl.arange(0, D)
    lse_ptr_R = lse_ptr + row_R * splits
    lse = ()
    top_R = tl.full([R], -1e30, tl.float32)
    for x in tl.static_range(X):
        lse_R = tl.load(
            lse_ptr_R + x, mask=inside_R & (tl.full([R], x, tl.int32) < splits), other=float("-inf")
        )
        top_R = tl.maximum(top_R, lse_R)
        lse = lse + (lse_R,)
    sum_R = tl.zeros([R], tl.float32)
    out_RD = tl.zeros([R, D], tl.float32)
    for x in tl.static_range(X):
        weight_R = tl.exp2(lse[x] - top_R)
        at_RD = (row_R.to(tl.int64) * splits + x)[:, None] * D + channel_D[None, :]
        partial_RD = tl.load(partial_ptr + at_RD, mask=(weight_R > 0)[:, None], other=0.0)
        out_RD += partial_RD.to(tl.float32) * weight_R[:, None]
        sum_R += weight_R
    out_RD /= tl.maximum(sum_R, 1e-30)[:, None]
    kv_head_R = row_R % Q // G
    out_ptr_R = out_ptr + row_R.to(tl.int64) * D
    if ROTATE:
        for half in tl.static_range(2):
            at_C = tl.arange(0, D // 2) + half * (D // 2)
            out_RC = rotated(out_RD, signs_ptr, at_C, 3, D)
            out_RC = rescaled(out_RC, scale_ptr, shift_ptr, kv_head_R, at_C, inside_R, SCALE, SHIFT, D)
            tl.store(out_ptr_R[:, None] + at_C[None, :], out_RC, mask=inside_R[:, None])
    else:
        out_RD = rescaled(out_RD, scale_ptr, shift_ptr, kv_head_R, channel_D, inside_R, SCALE, SHIFT, D)
        tl.store(out_ptr_R[:, None] + channel_D[None, :], out_RD, mask=inside_R[:, None])
