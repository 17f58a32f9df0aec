"""Writes a step's new keys and values into their pages: transform, quantize, store.

The same launch may transform the step's queries as well: a separate launch costs more than
the work. Legend: see `cache_view.py`; here T tokens of a tile, C half the channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels import cpu
from quire.kernels._encode import divide, store_side
from quire.kernels._transform import bf16_terms, changes_query, rotated, rotation_signs, transform_query
from quire.kernels._triton import check_head_dim, groups_of
from quire.kernels.cache_view import LayerCache
from quire.kernels.formats import KVFormat
from quire.kernels.transform import SideTransform

_TILE_TOKENS = 16  # the least that keeps a rotation's tensor cores busy
_MANY_ROWS = 1 << 15  # tokens * kv heads: enough programs for wider tiles, which load the rotation less often
_WIDE_TILE_TOKENS = 64
_WIDE_TERMS = 2  # of a rotation (`bf16_terms`): more of them spill in wide tiles
_FOUR_WARPS_HEAD_DIM = 128  # more channels spill


def write_kv(cache: LayerCache, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
    """Store each token's K and V at its slot (`PagedBatch.slots_T`); a slot of -1 stores nothing.

    k_THD, v_THD: any floating type, untransformed, RoPE applied. Source: `ref.paged.write_kv_ref`.
    """
    if cache.pool_NB.device.type == "cpu":
        cpu.write_kv(cache, k_THD, v_THD, slots_T)
    else:
        launch_write(cache, k_THD, v_THD, slots_T)


def write_step(cache: LayerCache, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> Tensor:
    """Run `write_kv` and transform queries for `decode_attention(..., transformed=True)`: one launch.

    q_TQD may be of the step's first tokens only. Where this layer's keys are stored as they are, and on a CPU
    (whose attention transforms as it goes), the queries come back unchanged, else as fp32. Those of padding
    tokens (slot -1) are transformed like all others.
    """
    if cache.pool_NB.device.type == "cpu":
        cpu.write_kv(cache, k_THD, v_THD, slots_T)
        return q_TQD
    return launch_write_step(cache, q_TQD, k_THD, v_THD, slots_T)


def launch_write_step(
    cache: LayerCache, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor
) -> Tensor:
    """Run `write_step` on a GPU."""
    if not changes_query(cache.k_transform):
        launch_write(cache, k_THD, v_THD, slots_T)
        return transform_query(cache.k_transform, q_TQD)
    out_TQD = q_TQD.new_empty(q_TQD.shape, dtype=torch.float32)
    launch_write(cache, k_THD, v_THD, slots_T, q_TQD, out_TQD)
    return out_TQD


def launch_write(
    cache: LayerCache,
    k_THD: Tensor,
    v_THD: Tensor,
    slots_T: Tensor,
    q_TQD: Tensor | None = None,
    q_out_TQD: Tensor | None = None,
) -> None:
    """Write both sides and, if given, the queries in one launch, along the grid's last axis."""
    layout, cell, fmt = cache.layout, cache.cell, cache.format
    head_dim = check_head_dim(cache)
    tokens = slots_T.shape[0]
    k_THD, v_THD = _dense_rows(k_THD), _dense_rows(v_THD)
    q = k_THD[:0] if q_TQD is None else _dense_rows(q_TQD)
    group = 0 if q_TQD is None else q.shape[1] // layout.kv_heads
    sides = _side("K", fmt.k, cache.k_transform, k_THD) | _side("V", fmt.v, cache.v_transform, v_THD)
    terms = max(sides["K_ROTATE"], sides["V_ROTATE"])
    wide = 0 < terms <= _WIDE_TERMS and tokens * layout.kv_heads >= _MANY_ROWS
    tile_tokens = _WIDE_TILE_TOKENS if wide else _TILE_TOKENS
    write_kernel[(triton.cdiv(tokens, tile_tokens), layout.kv_heads, 2 + group)](
        k_THD,
        v_THD,
        q,
        q_out_TQD,
        slots_T,
        cache.pool_NB,
        cache.k_transform.shift_HD,
        cache.k_transform.scale_HD,
        cache.v_transform.shift_HD,
        cache.v_transform.scale_HD,
        rotation_signs(head_dim, k_THD.device) if terms else None,
        tokens,
        q.shape[0],
        k_THD.stride(0),
        k_THD.stride(1),
        v_THD.stride(0),
        v_THD.stride(1),
        q.stride(0),
        q.stride(1),
        layout.page_bytes,
        layout.head_bytes,
        cell.k_codes,
        K_SCALES=cell.k_scales - cell.k_codes,
        V_CODES=cell.v_codes - cell.k_codes,
        V_SCALES=cell.v_scales - cell.k_codes,
        **sides,
        Q_TERMS=bf16_terms(q.dtype, cache.k_transform.scale_HD is not None),
        G=group,
        D=head_dim,
        P=layout.page_tokens,
        T=tile_tokens,
        num_warps=8 if wide or head_dim > _FOUR_WARPS_HEAD_DIM else 4,
        enable_fp_fusion=True,
    )


def _dense_rows(x_THD: Tensor) -> Tensor:
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()


def _side(name: str, fmt: KVFormat, transform: SideTransform, x_THD: Tensor) -> dict[str, Any]:
    """Return one side's constexprs: codes, groups, and its transform (a rotation by its terms)."""
    affine = transform.shift_HD is not None or transform.scale_HD is not None
    return {
        f"{name}C": fmt.codes.value,
        f"{name}G": groups_of(fmt, x_THD.shape[2]),
        f"{name}_ROTATE": bf16_terms(x_THD.dtype, affine) if transform.rotate else 0,
        f"{name}_SHIFT": transform.shift_HD is not None,
        f"{name}_SCALE": transform.scale_HD is not None,
    }


@triton.jit(do_not_specialize=["tokens", "query_tokens"])
def write_kernel(
    k_ptr,
    v_ptr,
    q_ptr,
    q_out_ptr,
    slots_ptr,
    pool_ptr,
    k_shift_ptr,
    k_scale_ptr,
    v_shift_ptr,
    v_scale_ptr,
    signs_ptr,
    tokens,
    query_tokens,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    q_stride_t,
    q_stride_h,
    page_bytes,
    head_bytes,
    layer_at,
    K_SCALES: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALES: tl.constexpr,
    KC: tl.constexpr,
    KG: tl.constexpr,
    K_ROTATE: tl.constexpr,
    K_SHIFT: tl.constexpr,
    K_SCALE: tl.constexpr,
    VC: tl.constexpr,
    VG: tl.constexpr,
    V_ROTATE: tl.constexpr,
    V_SHIFT: tl.constexpr,
    V_SCALE: tl.constexpr,
    Q_TERMS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
):
    """Grid (token tiles, kv heads, 2 + G): K, V, and the G query heads of the kv head, if there are any."""
    head, side = tl.program_id(1), tl.program_id(2)
    token_T = tl.program_id(0) * T + tl.arange(0, T)
    slot_T = tl.load(slots_ptr + token_T, mask=token_T < tokens, other=-1)
    stored_T = slot_T >= 0
    cell_ptr_T = pool_ptr + ((slot_T // P) * page_bytes + head.to(tl.int64) * head_bytes + layer_at)
    at_T = (slot_T % P).to(tl.int32)
    if side == 0:
        row_ptr_T = k_ptr + token_T.to(tl.int64) * k_stride_t + head * k_stride_h
        low_TC, high_TC = _load_transformed(
            row_ptr_T, stored_T, k_shift_ptr, k_scale_ptr, signs_ptr, head, K_ROTATE, K_SHIFT, K_SCALE, D
        )
        store_side(cell_ptr_T, cell_ptr_T + K_SCALES, at_T, stored_T, low_TC, high_TC, False, KC, KG, D, P, T)
    elif side == 1:
        row_ptr_T = v_ptr + token_T.to(tl.int64) * v_stride_t + head * v_stride_h
        low_TC, high_TC = _load_transformed(
            row_ptr_T, stored_T, v_shift_ptr, v_scale_ptr, signs_ptr, head, V_ROTATE, V_SHIFT, V_SCALE, D
        )
        cell_ptr_T += V_CODES
        scales_ptr_T = cell_ptr_T + (V_SCALES - V_CODES)
        store_side(cell_ptr_T, scales_ptr_T, at_T, stored_T, low_TC, high_TC, VC != "bf16", VC, VG, D, P, T)
    elif G > 0:
        q_head = head * G + side - 2
        row_ptr_T = q_ptr + token_T.to(tl.int64) * q_stride_t + q_head * q_stride_h
        out_ptr_T = q_out_ptr + (token_T.to(tl.int64) * (tl.num_programs(1) * G) + q_head) * D
        inside_T = token_T < query_tokens
        _transform_query(
            row_ptr_T, out_ptr_T, inside_T, k_scale_ptr, signs_ptr, head, K_SCALE, K_ROTATE > 0, Q_TERMS, D
        )


@triton.jit
def _transform_query(
    row_ptr_T,
    out_ptr_T,
    inside_T,
    scale_ptr,
    signs_ptr,
    head,
    SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
    TERMS: tl.constexpr,
    D: tl.constexpr,
):
    """Store R(q * scale) of a tile as fp32: `SideTransform.query`."""
    channel_D, channel_C = tl.arange(0, D), tl.arange(0, D // 2)
    q_TD = tl.load(row_ptr_T[:, None] + channel_D[None, :], mask=inside_T[:, None], other=0.0).to(tl.float32)
    if SCALE:
        q_TD *= tl.load(scale_ptr + head * D + channel_D)[None, :]
    if ROTATE:
        for half in tl.static_range(2):
            at_C = channel_C + half * (D // 2)
            q_TC = rotated(q_TD, signs_ptr, at_C, TERMS, D)
            tl.store(out_ptr_T[:, None] + at_C[None, :], q_TC, mask=inside_T[:, None])
    else:
        tl.store(out_ptr_T[:, None] + channel_D[None, :], q_TD, mask=inside_T[:, None])


@triton.jit
def _load_transformed(
    row_ptr_T,
    stored_T,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    head,
    ROTATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
):
    """Load R((x - shift) / scale) of a tile as fp32: low and high half of the channels, [T, C] each."""
    channel_C = tl.arange(0, D // 2)
    if ROTATE:
        channel_D = tl.arange(0, D)
        x_TD = _load_affine(row_ptr_T, stored_T, shift_ptr, scale_ptr, head, channel_D, SHIFT, SCALE, D)
        low_TC = rotated(x_TD, signs_ptr, channel_C, ROTATE, D)
        high_TC = rotated(x_TD, signs_ptr, channel_C + D // 2, ROTATE, D)
    else:
        low_TC = _load_affine(row_ptr_T, stored_T, shift_ptr, scale_ptr, head, channel_C, SHIFT, SCALE, D)
        high_TC = _load_affine(
            row_ptr_T, stored_T, shift_ptr, scale_ptr, head, channel_C + D // 2, SHIFT, SCALE, D
        )
    return low_TC, high_TC


@triton.jit
def _load_affine(
    row_ptr_T,
    stored_T,
    shift_ptr,
    scale_ptr,
    head,
    channel_C,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
):
    x_TC = tl.load(row_ptr_T[:, None] + channel_C[None, :], mask=stored_T[:, None], other=0.0).to(tl.float32)
    if SHIFT:
        x_TC -= tl.load(shift_ptr + head * D + channel_C)[None, :]
    if SCALE:
        x_TC = divide(x_TC, tl.load(scale_ptr + head * D + channel_C)[None, :])
    return x_TC
