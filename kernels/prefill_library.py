"""Prefill of one long chunk: history dequantized into a bounded workspace, and torch's attention over it.

A chunk of many rows reads every page many times: dequantizing each once is cheap
beside the products, and the best library kernel for 16-bit numbers beats ours for codes. The
chunk's own K and V are read back from their pages as well: it attends to what was quantized.

The library (cuDNN, through torch) compiles a kernel per shape, so shapes come in units of tokens:

      0         history         start     lead  |  chunk   |
      |-------------|-------------|---------------------------|0000|
        in pieces, all seen        one causal square of whole units

The square begins on a unit below the chunk: its first `lead` rows are zeros and are dropped.
Partial results are merged by their log-sum-exp. Legend: see `cache_view.py`; here L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels._transform import transform_output, transform_query_into
from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.dequantize import dequantize_pages, number_type

_UNIT_TOKENS = 512  # also the shortest chunk that gains: shorter ones are padded to it
_PIECE_TOKENS = 16384  # of history at once: the workspace, 64 MiB for 8 kv heads of 128 channels
_MERGE_ROWS = 16


def suits_library(cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec) -> bool:
    """Tell whether this path is possible and faster: one long sequence, plain causal attention."""
    return (
        batch.sequences == 1
        and batch.max_query_tokens >= _UNIT_TOKENS
        and not spec.window
        and not spec.softcap
        and cache.layout.head_dim in (64, 128)
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(q_TQD.device) >= (9, 0)
    )


@dataclass(frozen=True, slots=True)
class Stretches:
    """How the tokens of one sequence are split. All but `lead` are multiples of the unit."""

    history: Sequence[tuple[int, int]]
    """First token and length of each piece that every row sees."""
    start: int
    """First token of the square."""
    lead: int
    """Tokens of the square before the chunk's first."""
    square: int
    """Rows and columns."""


def plan_stretches(
    new_tokens: int, kv_tokens: int, unit: int = _UNIT_TOKENS, piece: int = _PIECE_TOKENS
) -> Stretches:
    """Split a sequence whose chunk is the last `new_tokens`; `piece` is a multiple of `unit`."""
    before = kv_tokens - new_tokens
    start = before // unit * unit
    history = tuple((at, min(piece, start - at)) for at in range(0, start, piece))
    return Stretches(history, start, before - start, triton.cdiv(kv_tokens - start, unit) * unit)


def library_attention(
    q_LQD: Tensor, k_HLD: Tensor, v_HLD: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [L, Q, D] and natural log-sum-exp fp32 [Q, L]. Row i sees all keys, or those up to i.

    The operator behind `scaled_dot_product_attention`'s cuDNN backend: the public function hides the
    log-sum-exp, and torch's varlen attention has no kernel of this speed.
    """
    out_1QLD, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_LQD.transpose(0, 1)[None], k_HLD[None], v_HLD[None], None, True, 0.0, causal, False, scale=scale
    )
    return out_1QLD[0].transpose(0, 1), lse.reshape(q_LQD.shape[1], q_LQD.shape[0])


Attend = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""The type of `library_attention`, which tests without a GPU replace."""


def attend_dequantized(
    cache: LayerCache,
    q_TQD: Tensor,
    batch: PagedBatch,
    spec: AttentionSpec,
    attend: Attend = library_attention,
) -> Tensor:
    """Compute `prefill_attention` of a single sequence for which `suits_library` holds."""
    rows, tokens = q_TQD.shape[0], batch.max_kv_tokens
    plan = plan_stretches(batch.max_query_tokens, tokens)
    pages_M, page_tokens = batch.page_table_SM[0], cache.layout.page_tokens
    square = max(plan.square, triton.cdiv(plan.lead + rows, _UNIT_TOKENS) * _UNIT_TOKENS)
    q_LQD = q_TQD.new_empty((square, *q_TQD.shape[1:]), dtype=number_type(cache))
    chunk = slice(plan.lead, plan.lead + rows)
    q_LQD[: chunk.start].zero_()
    q_LQD[chunk.stop :].zero_()
    transform_query_into(cache.k_transform, q_TQD, q_LQD[chunk])
    k_HLD, v_HLD = dequantize_pages(cache, pages_M[plan.start // page_tokens :], tokens - plan.start, square)
    out_LQD, lse_QL = attend(q_LQD, k_HLD, v_HLD, spec.scale, True)
    for first, length in plan.history:
        k_HLD, v_HLD = dequantize_pages(cache, pages_M[first // page_tokens :], length, length)
        part_LQD, part_lse_QL = attend(q_LQD, k_HLD, v_HLD, spec.scale, False)
        merge_partial(out_LQD[chunk], lse_QL[:, chunk], part_LQD[chunk], part_lse_QL[:, chunk])
    return transform_output(cache.v_transform, out_LQD[chunk], q_TQD.dtype)


def merge_partial(out_LQD: Tensor, lse_QL: Tensor, part_LQD: Tensor, part_lse_QL: Tensor) -> None:
    """Fold attention over more keys into `out` and its log-sum-exp, in place. Any strides but the last."""
    rows, query_heads, head_dim = out_LQD.shape
    _merge_kernel[(triton.cdiv(rows, _MERGE_ROWS), query_heads)](
        out_LQD,
        lse_QL,
        part_LQD,
        part_lse_QL,
        rows,
        out_LQD.stride(0),
        out_LQD.stride(1),
        part_LQD.stride(0),
        part_LQD.stride(1),
        lse_QL.stride(0),
        part_lse_QL.stride(0),
        D=head_dim,
        L=_MERGE_ROWS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    rows,
    out_stride_l,
    out_stride_q,
    part_stride_l,
    part_stride_q,
    lse_stride_q,
    part_lse_stride_q,
    D: tl.constexpr,
    L: tl.constexpr,
):
    """Grid (row tiles, query heads)."""
    row_L = tl.program_id(0).to(tl.int64) * L + tl.arange(0, L)
    head = tl.program_id(1)
    inside_L = row_L < rows
    channel_D = tl.arange(0, D)
    out_ptr_LD = out_ptr + (row_L * out_stride_l + head * out_stride_q)[:, None] + channel_D[None, :]
    part_ptr_LD = part_ptr + (row_L * part_stride_l + head * part_stride_q)[:, None] + channel_D[None, :]
    lse_ptr_L = lse_ptr + head * lse_stride_q + row_L
    lse_L = tl.load(lse_ptr_L, mask=inside_L, other=0.0)
    part_lse_L = tl.load(part_lse_ptr + head * part_lse_stride_q + row_L, mask=inside_L, other=0.0)
    out_LD = tl.load(out_ptr_LD, mask=inside_L[:, None], other=0.0).to(tl.float32)
    part_LD = tl.load(part_ptr_LD, mask=inside_L[:, None], other=0.0).to(tl.float32)
    top_L = tl.maximum(lse_L, part_lse_L)
    weight_L, part_weight_L = tl.exp(lse_L - top_L), tl.exp(part_lse_L - top_L)
    sum_L = weight_L + part_weight_L
    merged_LD = out_LD * (weight_L / sum_L)[:, None] + part_LD * (part_weight_L / sum_L)[:, None]
    tl.store(out_ptr_LD, merged_LD, mask=inside_L[:, None])
    tl.store(lse_ptr_L, top_L + tl.log(sum_L), mask=inside_L)
