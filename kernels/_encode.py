"""Quantizing a tile of numbers into the codes and scales of a page: `codec.encode` in a kernel.

Legend: see `write.py`; here g groups of a half of the channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_side(
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
    low_TgC = divide(low_TgC, scale_low_Tg[:, :, None]) + zero_low_Tg[:, :, None]
    high_TgC = divide(high_TgC, scale_high_Tg[:, :, None]) + zero_high_Tg[:, :, None]
    return tl.reshape(low_TgC, [T, D // 2]), tl.reshape(high_TgC, [T, D // 2])


@triton.jit
def _range(x_TgC, CODES: tl.constexpr):
    """Find the least and greatest number of each group and zero; symmetric formats take them from |x|."""
    if CODES == "int4":
        bottom_Tg, top_Tg = tl.minimum(tl.min(x_TgC, 2), 0.0), tl.maximum(tl.max(x_TgC, 2), 0.0)
    else:
        top_Tg = tl.max(tl.abs(x_TgC), 2)
        bottom_Tg = tl.zeros_like(top_Tg)
    return bottom_Tg, top_Tg


@triton.jit
def _scale_and_zero(bottom_Tg, top_Tg, CODES: tl.constexpr):
    """Compute the fp32 scale, rounded to fp16 as it is stored, and the integer zero."""
    STEPS: tl.constexpr = 15.0 if CODES == "int4" else (127.0 if CODES == "int8" else 448.0)
    scale_Tg = tl.clamp(divide(top_Tg - bottom_Tg, STEPS), 2.0**-24, 65504.0).to(tl.float16).to(tl.float32)
    if CODES == "int4":
        zero_Tg = _round(tl.clamp(divide(-bottom_Tg, scale_Tg), 0.0, 15.0))
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
    """Round to 4-bit codes; numbers with dynamic scales already include their zero."""
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
    """Round to e4m3 (nearest even, saturating at 448) by bits: the same on every device."""
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
    """Round to the nearest even integer, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def divide(x, y):
    """Divide as IEEE does: the fast one would flip codes that are half way."""
    x, y = tl.broadcast(x, y + tl.zeros_like(x))
    return tl.div_rn(x, y)


@triton.jit
def _finite(x_TC):
    """Replace NaN by 0; infinities saturate later."""
    return tl.where(x_TC == x_TC, x_TC, 0.0)
