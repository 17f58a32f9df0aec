"""Writes a step's new keys and values into their pages: transform, quantize, store.

Legend: see `paged.py`; here T tokens of a tile, C half the channels, g groups of a half.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels import cpu
from quire.kernels._transform import bf16_terms, rotated, rotation_signs
from quire.kernels._triton import check_head_dim, groups_of
from quire.kernels.formats import KVFormat
from quire.kernels.paged import LayerCache
from quire.kernels.transform import SideTransform

_TILE_TOKENS = 16  # the least a dot takes: the rotation is one


def write_kv(cache: LayerCache, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
    """Store each token's K and V at its slot (`PagedBatch.slots_T`); a slot of -1 stores nothing.

    k_THD, v_THD: any floating type, untransformed, RoPE applied. Source: `ref.paged.write_kv_ref`.
    """
    if cache.pool_NB.device.type == "cpu":
        cpu.write_kv(cache, k_THD, v_THD, slots_T)
    else:
        launch_write(cache, k_THD, v_THD, slots_T)


def launch_write(cache: LayerCache, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
    """One launch for both sides: their programs are neighbours on the grid's last axis."""
    layout, cell, fmt = cache.layout, cache.cell, cache.format
    head_dim = check_head_dim(cache)
    tokens = slots_T.shape[0]
    k_THD = k_THD if k_THD.stride(2) == 1 else k_THD.contiguous()
    v_THD = v_THD if v_THD.stride(2) == 1 else v_THD.contiguous()
    rotates = cache.k_transform.rotate or cache.v_transform.rotate
    write_kernel[(triton.cdiv(tokens, _TILE_TOKENS), layout.kv_heads, 2)](
        k_THD,
        v_THD,
        slots_T,
        cache.pool_NB,
        cache.k_transform.shift_HD,
        cache.k_transform.scale_HD,
        cache.v_transform.shift_HD,
        cache.v_transform.scale_HD,
        rotation_signs(head_dim, k_THD.device) if rotates else None,
        tokens,
        k_THD.stride(0),
        k_THD.stride(1),
        v_THD.stride(0),
        v_THD.stride(1),
        layout.page_bytes,
        layout.head_bytes,
        cell.k_codes,
        K_SCALES=cell.k_scales - cell.k_codes,
        V_CODES=cell.v_codes - cell.k_codes,
        V_SCALES=cell.v_scales - cell.k_codes,
        **_side("K", fmt.k, cache.k_transform, k_THD),
        **_side("V", fmt.v, cache.v_transform, v_THD),
        D=head_dim,
        P=layout.page_tokens,
        T=_TILE_TOKENS,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _side(name: str, fmt: KVFormat, transform: SideTransform, x_THD: Tensor) -> dict[str, object]:
    """One side's constexprs: codes, groups, and what of the transform there is (a rotation by its terms)."""
    affine = transform.shift_HD is not None or transform.scale_HD is not None
    return {
        f"{name}C": fmt.codes.value,
        f"{name}G": groups_of(fmt, x_THD.shape[2]),
        f"{name}_ROTATE": bf16_terms(x_THD.dtype, affine) if transform.rotate else 0,
        f"{name}_SHIFT": transform.shift_HD is not None,
        f"{name}_SCALE": transform.scale_HD is not None,
    }


@triton.jit(do_not_specialize=["tokens"])
def write_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    pool_ptr,
    k_shift_ptr,
    k_scale_ptr,
    v_shift_ptr,
    v_scale_ptr,
    signs_ptr,
    tokens,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
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
    D: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
):
    """Grid (token tiles, kv heads, sides: 0 is K)."""
    head = tl.program_id(1)
    token_T = tl.program_id(0) * T + tl.arange(0, T)
    slot_T = tl.load(slots_ptr + token_T, mask=token_T < tokens, other=-1)
    stored_T = slot_T >= 0
    cell_ptr_T = pool_ptr + ((slot_T // P) * page_bytes + head.to(tl.int64) * head_bytes + layer_at)
    at_T = (slot_T % P).to(tl.int32)
    if tl.program_id(2) == 0:
        row_ptr_T = k_ptr + token_T.to(tl.int64) * k_stride_t + head * k_stride_h
        low_TC, high_TC = _load_transformed(
            row_ptr_T, stored_T, k_shift_ptr, k_scale_ptr, signs_ptr, head, K_ROTATE, K_SHIFT, K_SCALE, D
        )
        _store_side(
            cell_ptr_T, cell_ptr_T + K_SCALES, at_T, stored_T, low_TC, high_TC, False, KC, KG, D, P, T
        )
    else:
        row_ptr_T = v_ptr + token_T.to(tl.int64) * v_stride_t + head * v_stride_h
        low_TC, high_TC = _load_transformed(
            row_ptr_T, stored_T, v_shift_ptr, v_scale_ptr, signs_ptr, head, V_ROTATE, V_SHIFT, V_SCALE, D
        )
        cell_ptr_T += V_CODES
        scales_ptr_T = cell_ptr_T + (V_SCALES - V_CODES)
        _store_side(cell_ptr_T, scales_ptr_T, at_T, stored_T, low_TC, high_TC, VC != "bf16", VC, VG, D, P, T)


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
    """R((x - shift) / scale) of a tile in fp32: the low and the high half of the channels, [T, C] each."""
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
        x_TC = _divide(x_TC, tl.load(scale_ptr + head * D + channel_C)[None, :])
    return x_TC


@triton.jit
def _store_side(
    codes_ptr_T,
    scales_ptr_T,
    at_T,
    stored_T,
    low_TC,
    high_TC,
    TRANSPOSED: tl.constexpr,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
):
    """Quantize a tile's halves as `codec.encode` does and store codes and scales."""
    BYTES: tl.constexpr = D // 2 if CODES == "int4" else D
    channel_C = tl.arange(0, D // 2)
    stored_T1 = stored_T[:, None]
    if CODES == "bf16":
        ptr_TC = (
            codes_ptr_T.to(tl.pointer_type(tl.bfloat16))[:, None] + at_T[:, None] * D + channel_C[None, :]
        )
        tl.store(ptr_TC, low_TC.to(tl.bfloat16), mask=stored_T1)
        tl.store(ptr_TC + D // 2, high_TC.to(tl.bfloat16), mask=stored_T1)
    else:
        low_TC, high_TC = _finite(low_TC), _finite(high_TC)
        if GROUPS > 0:
            low_TC, high_TC = _scale_halves(
                scales_ptr_T, at_T, stored_T, low_TC, high_TC, CODES, GROUPS, D, P, T
            )
        if TRANSPOSED:
            ptr_TC = codes_ptr_T[:, None] + channel_C[None, :] * P + at_T[:, None]
        else:
            ptr_TC = codes_ptr_T[:, None] + at_T[:, None] * BYTES + channel_C[None, :]
        if CODES == "int4":
            low_TC, high_TC = _nibble(low_TC, GROUPS > 0), _nibble(high_TC, GROUPS > 0)
            tl.store(ptr_TC, (low_TC | high_TC << 4).to(tl.uint8), mask=stored_T1)
        else:
            tl.store(ptr_TC, _byte(low_TC, CODES), mask=stored_T1)
            tl.store(ptr_TC + D // 2 * (P if TRANSPOSED else 1), _byte(high_TC, CODES), mask=stored_T1)


@triton.jit
def _scale_halves(
    scales_ptr_T,
    at_T,
    stored_T,
    low_TC,
    high_TC,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
):
    """Store the tile's dynamic scales; return its halves in units of them (int4: from their zero)."""
    GROUPS_HALF: tl.constexpr = GROUPS // 2 if GROUPS > 1 else 1
    group_g = tl.arange(0, GROUPS_HALF)
    low_TgC = tl.reshape(low_TC, [T, GROUPS_HALF, D // 2 // GROUPS_HALF])
    high_TgC = tl.reshape(high_TC, [T, GROUPS_HALF, D // 2 // GROUPS_HALF])
    bottom_low_Tg, top_low_Tg = _range(low_TgC, CODES)
    bottom_high_Tg, top_high_Tg = _range(high_TgC, CODES)
    if GROUPS == 1:
        bottom_low_Tg = tl.minimum(bottom_low_Tg, bottom_high_Tg)
        top_low_Tg = tl.maximum(top_low_Tg, top_high_Tg)
        bottom_high_Tg, top_high_Tg = bottom_low_Tg, top_low_Tg
    scale_low_Tg, zero_low_Tg = _scale_and_zero(bottom_low_Tg, top_low_Tg, CODES)
    scale_high_Tg, zero_high_Tg = _scale_and_zero(bottom_high_Tg, top_high_Tg, CODES)
    place_Tg = group_g[None, :] * P + at_T[:, None]
    _store_scale(scales_ptr_T, place_Tg, stored_T, scale_low_Tg, zero_low_Tg, CODES)
    if GROUPS > 1:
        _store_scale(scales_ptr_T, place_Tg + GROUPS_HALF * P, stored_T, scale_high_Tg, zero_high_Tg, CODES)
    low_TgC = _divide(low_TgC, scale_low_Tg[:, :, None]) + zero_low_Tg[:, :, None]
    high_TgC = _divide(high_TgC, scale_high_Tg[:, :, None]) + zero_high_Tg[:, :, None]
    return tl.reshape(low_TgC, [T, D // 2]), tl.reshape(high_TgC, [T, D // 2])


@triton.jit
def _range(x_TgC, CODES: tl.constexpr):
    """Least and greatest number of each group, zero included; symmetric formats take them from |x|."""
    if CODES == "int4":
        bottom_Tg, top_Tg = tl.minimum(tl.min(x_TgC, 2), 0.0), tl.maximum(tl.max(x_TgC, 2), 0.0)
    else:
        top_Tg = tl.max(tl.abs(x_TgC), 2)
        bottom_Tg = tl.zeros_like(top_Tg)
    return bottom_Tg, top_Tg


@triton.jit
def _scale_and_zero(bottom_Tg, top_Tg, CODES: tl.constexpr):
    """fp32 scale, rounded to fp16 before its use as the reader will see it, and integer zero."""
    STEPS: tl.constexpr = 15.0 if CODES == "int4" else (127.0 if CODES == "int8" else 448.0)
    scale_Tg = tl.clamp(_divide(top_Tg - bottom_Tg, STEPS), 2.0**-14, 65504.0).to(tl.float16).to(tl.float32)
    if CODES == "int4":
        zero_Tg = _round(tl.clamp(_divide(-bottom_Tg, scale_Tg), 0.0, 15.0))
    else:
        zero_Tg = tl.zeros_like(scale_Tg)
    return scale_Tg, zero_Tg


@triton.jit
def _store_scale(section_ptr_T, place_Tg, stored_T, scale_Tg, zero_Tg, CODES: tl.constexpr):
    word_Tg = scale_Tg.to(tl.float16).to(tl.uint16, bitcast=True)
    if CODES == "int4":
        zero_bits_Tg = zero_Tg.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        word_Tg = word_Tg.to(tl.uint32) | zero_bits_Tg << 16
        ptr_T = section_ptr_T.to(tl.pointer_type(tl.uint32))
    else:
        ptr_T = section_ptr_T.to(tl.pointer_type(tl.uint16))
    tl.store(ptr_T[:, None] + place_Tg, word_Tg, mask=stored_T[:, None])


@triton.jit
def _nibble(x_TC, DYNAMIC: tl.constexpr):
    """Codes as integers: dynamic ones count from their zero already."""
    code_TC = _round(tl.clamp(x_TC, 0.0, 15.0)) if DYNAMIC else _round(tl.clamp(x_TC, -7.0, 7.0)) + 8.0
    return code_TC.to(tl.int32)


@triton.jit
def _byte(x_TC, CODES: tl.constexpr):
    if CODES == "int8":
        code_TC = (_round(tl.clamp(x_TC, -127.0, 127.0)) + 128.0).to(tl.int32).to(tl.uint8)
    else:
        code_TC = _fp8_bits(x_TC)
    return code_TC


@triton.jit
def _fp8_bits(x_TC):
    """e4m3 to the nearest even, saturating at 448, by bits: the same on every device."""
    bits_TC = x_TC.to(tl.int32, bitcast=True)
    size_TC = tl.minimum(tl.abs(x_TC), 448.0)
    size_bits_TC = size_TC.to(tl.int32, bitcast=True)
    rounded_TC = size_bits_TC + 0x7FFFF + ((size_bits_TC >> 20) & 1)
    normal_TC = (rounded_TC >> 20) - ((127 - 7) << 3)
    subnormal_TC = _round(size_TC * 512.0).to(tl.int32)  # below 2**-6 codes count in steps of 2**-9
    code_TC = tl.where(size_TC < 0.015625, subnormal_TC, normal_TC)
    return (code_TC | ((bits_TC >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _round(x):
    """To the nearest even integer, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _divide(x, y):
    """IEEE division: the fast one would flip codes that lie half way."""
    x, y = tl.broadcast(x, y + tl.zeros_like(x))
    return tl.div_rn(x, y)


@triton.jit
def _finite(x_TC):
    """NaN becomes 0; infinities saturate later."""
    return tl.where(x_TC == x_TC, x_TC, 0.0)
