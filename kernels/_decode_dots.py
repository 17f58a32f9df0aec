"""The two products of decode on the codes of one page, with swapped operands.

S' = K Q' and O' = V' P': tokens and channels are the long sides of both dots and the query rows their short
side, so that a GQA group pads to 8 rows, and codes enter the dots from registers without shuffles.

Legend: see `decode.py`; here W channels of a piece (see `_triton.py`).
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels._triton import (
    INT8_ZERO,
    MAGIC,
    factor_of,
    first_channel,
    fp8_to_fp16,
    group_of,
    int4_to_fp16,
    int8_to_fp16,
    pieces,
    scale_of,
    without_nan,
    zero_of,
)


@triton.jit
def load_queries(row_ptr_R, used_R, KC: tl.constexpr, KG: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Q in pieces as the dots with K's take them, each [W, R], and their fp32 sums [R].

    Not scaled: bf16 to fp16 is exact in fp16's normal range, so the softmax scale rides on K's.
    High nibbles arrive as 16 h: their Q is divided by 16.
    """
    channel_W = tl.arange(0, D // pieces(KC, KG))
    q = ()
    sums = ()
    for i in tl.static_range(pieces(KC, KG)):
        ptr_WR = row_ptr_R[None, :] + (channel_W + first_channel(i, KC, KG, D))[:, None]
        x_WR = tl.load(ptr_WR, mask=used_R[None, :], other=0.0)
        if KC == "bf16":
            x_WR = x_WR.to(tl.bfloat16)
        else:
            x_WR = (tl.clamp(x_WR.to(tl.float32), -65504.0, 65504.0) / factor_of(i, KC)).to(tl.float16)
        q = q + (x_WR,)
        sums = sums + (tl.sum(x_WR.to(tl.float32), 0),)
    return q, sums


@triton.jit
def logits(
    codes,
    q,
    q_sum,
    words,
    scale_log2e,
    KC: tl.constexpr,
    KG: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    """Scaled logits in base 2, fp32 [P, R]. Zero points and the magic 1024 leave through the sums of Q."""
    if KC == "int4" and KG <= 1:
        low, high = int4_to_fp16(codes[0], ASM)
        dot_PR = tl.dot(high, q[1], tl.dot(low, q[0]))
        if KG == 1:
            zero_P = zero_of(words[0])
            offset_PR = ((q_sum[0] + q_sum[1]) * MAGIC)[None, :] + zero_P[:, None] * (
                q_sum[0] + 16.0 * q_sum[1]
            )[None, :]
            logit_PR = (dot_PR - offset_PR) * (scale_of(words[0], KC) * scale_log2e)[:, None]
        else:
            logit_PR = (
                dot_PR - (q_sum[0] * (MAGIC + 8.0) + q_sum[1] * (MAGIC + 128.0))[None, :]
            ) * scale_log2e
    elif KC == "int4":
        logit_PR = tl.zeros([P, R], tl.float32)
        for g in tl.static_range(KG // 2):
            low, high = int4_to_fp16(codes[g], ASM)
            low_word, high_word = words[g], words[KG // 2 + g]
            low_PR = tl.dot(low, q[2 * g]) - q_sum[2 * g][None, :] * (zero_of(low_word) + MAGIC)[:, None]
            high_PR = (
                tl.dot(high, q[2 * g + 1])
                - q_sum[2 * g + 1][None, :] * (zero_of(high_word) * 16.0 + MAGIC)[:, None]
            )
            logit_PR += low_PR * (scale_of(low_word, KC) * scale_log2e)[:, None]
            logit_PR += high_PR * (scale_of(high_word, KC) * scale_log2e)[:, None]
    elif KG == 0:
        logit_PR = _dot_bytes(codes[0], q[0], q_sum[0], KC, ASM, FP8_NATIVE) * scale_log2e
    else:
        logit_PR = tl.zeros([P, R], tl.float32)
        for g in tl.static_range(KG):
            dot_PR = _dot_bytes(codes[g], q[g], q_sum[g], KC, ASM, FP8_NATIVE)
            logit_PR += dot_PR * (scale_of(words[g], KC) * scale_log2e)[:, None]
    return logit_PR


@triton.jit
def _dot_bytes(codes_PW, q_WR, q_sum_R, KC: tl.constexpr, ASM: tl.constexpr, FP8_NATIVE: tl.constexpr):
    """Compute codes . q of a part of one number per byte (or 16 bits), fp32 [P, R]."""
    if KC == "int8":
        dot_PR = tl.dot(int8_to_fp16(codes_PW, ASM), q_WR) - (q_sum_R * INT8_ZERO)[None, :]
    elif KC == "fp8":
        dot_PR = tl.dot(fp8_to_fp16(codes_PW, ASM, FP8_NATIVE), q_WR)
    else:
        dot_PR = tl.dot(codes_PW, q_WR)
    return dot_PR


@triton.jit
def accumulate(
    acc,
    codes,
    prob_PR,
    decay_R,
    words,
    written_P,
    VC: tl.constexpr,
    VG: tl.constexpr,
    ASM: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    """Compute acc * decay + V' P' for every part, each [W, R]; high nibbles stay times 16.

    V's scales multiply the probabilities. Zero points and the magic 1024 leave page by page: left in the
    accumulator they would grow with the context and eat its precision.
    """
    new = ()
    for i in tl.static_range(pieces(VC, VG)):
        if VG > 0:
            word_P = words[group_of(i, VC, VG)]
            scaled_PR = prob_PR * tl.where(written_P, scale_of(word_P, VC), 0.0)[:, None]
        else:
            scaled_PR = prob_PR
        if VC == "bf16":
            dot_WR = tl.dot(tl.trans(codes[0]), scaled_PR.to(tl.bfloat16))
        elif VC == "fp8":
            v_WP = without_nan(fp8_to_fp16(codes[i], ASM, FP8_NATIVE), FP8_NATIVE)
            dot_WR = tl.dot(v_WP, scaled_PR.to(tl.float16))
        elif VC == "int8":
            scaled_PR = scaled_PR.to(tl.float16)
            dot_WR = tl.dot(int8_to_fp16(codes[i], ASM), scaled_PR)
            dot_WR -= (tl.sum(scaled_PR.to(tl.float32), 0) * INT8_ZERO)[None, :]
        else:
            scaled_PR = scaled_PR.to(tl.float16)
            nibbles = int4_to_fp16(codes[i // 2], ASM)
            if VG > 0:
                offset_P = tl.where(written_P, zero_of(word_P), 0.0) * factor_of(i, VC) + MAGIC
                offset_R = tl.sum(scaled_PR.to(tl.float32) * offset_P[:, None], 0)
            else:
                offset_R = tl.sum(scaled_PR.to(tl.float32), 0) * (MAGIC + 8.0 * factor_of(i, VC))
            dot_WR = tl.dot(nibbles[i % 2], scaled_PR) - offset_R[None, :]
        new = new + (acc[i] * decay_R[None, :] + dot_WR,)
    return new


@triton.jit
def store_output(out_ptr_R, acc, factor_R, used_R, VC: tl.constexpr, VG: tl.constexpr, D: tl.constexpr):
    channel_W = tl.arange(0, D // pieces(VC, VG))
    for i in tl.static_range(pieces(VC, VG)):
        ptr_WR = out_ptr_R[None, :] + (channel_W + first_channel(i, VC, VG, D))[:, None]
        tl.store(ptr_WR, acc[i] * (factor_R / factor_of(i, VC))[None, :], mask=used_R[None, :])
