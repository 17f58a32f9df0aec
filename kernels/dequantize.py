"""Dequantizing pages into plain 16-bit tensors, for kernels that read those.

Legend: see `cache_view.py`; here L tokens of one sequence, W channels of a piece (see `_triton.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels._triton import (
    MAGIC,
    check_head_dim,
    factor_of,
    first_channel,
    fp8_to_fp16,
    group_of,
    groups_of,
    instructions,
    int4_to_fp16,
    int8_to_fp16,
    load_codes,
    load_scales,
    pieces,
    scale_of,
    without_nan,
    zero_of,
)
from quire.kernels.cache_view import LayerCache
from quire.kernels.formats import Codes
from quire.kernels.ref.paged import read_kv_ref


def number_type(cache: LayerCache) -> torch.dtype:
    """Choose the 16-bit type for both sides of this layer: bf16 if either is stored as bf16, else fp16."""
    codes = (cache.format.k.codes, cache.format.v.codes)
    return torch.bfloat16 if Codes.BF16 in codes else torch.float16


def dequantize_pages(cache: LayerCache, pages_M: Tensor, tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """Dequantize the first `tokens` tokens of the given pages, K and V as stored (still transformed).

    Returns: two [H, length, D] of `number_type`; rows past `tokens` are zero, whatever the pages hold there.
    Source: `dequantize_pages_ref`.
    """
    if tokens > min(length, pages_M.shape[0] * cache.layout.page_tokens):
        raise ValueError(
            f"{tokens} tokens requested of {pages_M.shape[0]} pages of {cache.layout.page_tokens} tokens, "
            f"into {length} rows; pass all the pages of the sequence and as many rows"
        )
    if cache.pool_NB.device.type == "cpu":
        return dequantize_pages_ref(cache, pages_M, tokens, length)
    return launch_dequantize(cache, pages_M, tokens, length)


def launch_dequantize(cache: LayerCache, pages_M: Tensor, tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """Launch one program per page, head and side."""
    layout, cell, fmt = cache.layout, cache.cell, cache.format
    head_dim = check_head_dim(cache)
    asm, fp8_native = instructions(cache.pool_NB.device)
    k_HLD, v_HLD = (
        cache.pool_NB.new_empty((layout.kv_heads, length, head_dim), dtype=number_type(cache))
        for _ in range(2)
    )
    dequantize_kernel[(triton.cdiv(length, layout.page_tokens), layout.kv_heads, 2)](
        cache.pool_NB,
        pages_M,
        k_HLD,
        v_HLD,
        tokens,
        length,
        layout.page_bytes,
        layout.head_bytes,
        cell.k_codes,
        K_SCALES=cell.k_scales - cell.k_codes,
        V_CODES=cell.v_codes - cell.k_codes,
        V_SCALES=cell.v_scales - cell.k_codes,
        KC=fmt.k.codes.value,
        VC=fmt.v.codes.value,
        KG=groups_of(fmt.k, head_dim),
        VG=groups_of(fmt.v, head_dim),
        D=head_dim,
        P=layout.page_tokens,
        ASM=asm,
        FP8_NATIVE=fp8_native,
        num_warps=4,
    )
    return k_HLD, v_HLD


@triton.jit(do_not_specialize=["tokens", "length"])
def dequantize_kernel(
    pool_ptr,
    pages_ptr,
    k_ptr,
    v_ptr,
    tokens,
    length,
    page_bytes,
    head_bytes,
    layer_at,
    K_SCALES: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALES: tl.constexpr,
    KC: tl.constexpr,
    VC: tl.constexpr,
    KG: tl.constexpr,
    VG: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    ASM: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    """Grid (pages, kv heads, sides: 0 is K). Pages past the last token are not read: their rows are zero."""
    at_P = tl.program_id(0) * P + tl.arange(0, P)
    head = tl.program_id(1).to(tl.int64)
    page = tl.load(pages_ptr + tl.program_id(0), mask=tl.program_id(0) * P < tokens, other=0).to(tl.int64)
    cell_ptr = pool_ptr + (page * page_bytes + head * head_bytes + layer_at)
    row_ptr_P = (head * length + at_P) * D
    if tl.program_id(2) == 0:
        _dequantize_side(
            cell_ptr, cell_ptr + K_SCALES, k_ptr + row_ptr_P, at_P, tokens, length,
            False, KC, KG, D, P, ASM, FP8_NATIVE,
        )  # fmt: skip
    else:
        _dequantize_side(
            cell_ptr + V_CODES, cell_ptr + V_SCALES, v_ptr + row_ptr_P, at_P, tokens, length,
            True, VC, VG, D, P, ASM, FP8_NATIVE,
        )  # fmt: skip


@triton.jit
def _dequantize_side(
    codes_ptr,
    scales_ptr,
    row_ptr_P,
    at_P,
    tokens,
    length,
    IS_V: tl.constexpr,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    ASM: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    written_P = at_P < tokens
    codes = load_codes(codes_ptr, written_P, CODES, GROUPS, D, P, IS_V)
    words = load_scales(scales_ptr, tl.arange(0, P), CODES, GROUPS, P)
    channel_W = tl.arange(0, D // pieces(CODES, GROUPS))
    for j in tl.static_range(pieces(CODES, GROUPS)):
        x = dequantize_piece(codes, words, written_P, j, CODES, GROUPS, IS_V, ASM, FP8_NATIVE)
        x_PW = tl.trans(x) if IS_V and CODES != "bf16" else x
        x_PW = tl.where(written_P[:, None], x_PW, 0.0)
        ptr_PW = row_ptr_P[:, None] + (channel_W + first_channel(j, CODES, GROUPS, D))[None, :]
        tl.store(ptr_PW, x_PW, mask=(at_P < length)[:, None])


@triton.jit
def dequantize_piece(
    codes,
    words,
    written_P,
    piece: tl.constexpr,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_V: tl.constexpr,
    ASM: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    """Dequantize one piece of a page to fp16 (bf16 as stored): K and 16-bit V [P, W], other V [W, P].

    Integer codes less their zero are exact in fp16; only the product with the scale rounds.
    """
    if CODES == "bf16":
        x = codes[0]
    else:
        if GROUPS > 0:
            word_P = words[group_of(piece, CODES, GROUPS)]
            scale_P = tl.where(written_P, scale_of(word_P, CODES), 0.0)
        if CODES == "fp8":
            x = fp8_to_fp16(codes[piece], ASM, FP8_NATIVE)
            if IS_V:
                x = without_nan(x, FP8_NATIVE)
        elif CODES == "int8":
            x = int8_to_fp16(codes[piece], ASM) - 1152.0
        else:
            FACTOR: tl.constexpr = factor_of(piece, CODES)
            x = int4_to_fp16(codes[piece // 2], ASM)[piece % 2]
            x *= 1.0 / FACTOR  # exact; the scale may be among fp16's smallest numbers
            if GROUPS > 0:
                zero_P = tl.where(written_P, zero_of(word_P), 0.0) + MAGIC / FACTOR
                x -= _along_tokens(zero_P.to(tl.float16), IS_V)
            else:
                x -= 8.0 + MAGIC / FACTOR
        if GROUPS > 0:
            x *= _along_tokens(scale_P.to(tl.float16), IS_V)
    return x


@triton.jit
def _along_tokens(x_P, IS_V: tl.constexpr):
    return x_P[None, :] if IS_V else x_P[:, None]


def dequantize_pages_ref(
    cache: LayerCache, pages_M: Tensor, tokens: int, length: int
) -> tuple[Tensor, Tensor]:
    """Round `read_kv_ref` of the pages in use to `number_type`."""
    used = pages_M[: triton.cdiv(tokens, cache.layout.page_tokens)].long()
    sides = []
    for x_LHD in read_kv_ref(cache, used):
        out_HLD = x_LHD.new_zeros((x_LHD.shape[1], length, x_LHD.shape[2]), dtype=number_type(cache))
        out_HLD[:, :tokens] = x_LHD[:tokens].transpose(0, 1)
        sides.append(out_HLD)
    return sides[0], sides[1]
