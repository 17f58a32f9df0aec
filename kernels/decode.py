"""Attention of few query rows per sequence over its pages: split over the pages, then combined.

Legend: see `paged.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels import cpu
from quire.kernels._attend import Tiling, launch_attend
from quire.kernels.formats import Codes
from quire.kernels.paged import AttentionSpec, LayerCache, PagedBatch

_MAX_ROWS = 16  # more rows would spill registers; they become further tiles
_PROGRAMS_PER_MULTIPROCESSOR = 8
_MIN_PAGES_PER_SPLIT = 4
_MAX_SPLITS = 64


def decode_attention(cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Causal attention of each sequence's last rows over all its pages: [T, Q, D] of q's type.

    Right for any number of rows, quick for few (8 and less). Rows of no sequence are undefined.
    Raises FormatError where the stored format cannot serve this attention. Source: `ref.paged.attend_ref`.
    """
    spec.check(cache)
    if q_TQD.device.type == "cpu":
        return cpu.attend(cache, q_TQD, batch, spec)
    multiprocessors = torch.cuda.get_device_properties(q_TQD.device).multi_processor_count
    return launch_decode(cache, q_TQD, batch, spec, multiprocessors)


def plan_decode(cache: LayerCache, query_heads: int, batch: PagedBatch, window: int | None, multiprocessors: int) -> Tiling:
    """Tiles that fill the device: pages are split until every multiprocessor has work, but never into
    shares so short that starting a program costs more than its pages. Pure.
    """
    layout = cache.layout
    rows = batch.max_query_tokens * (query_heads // layout.kv_heads)
    tile = min(_MAX_ROWS, max(8, triton.next_power_of_2(rows)))
    pages = triton.cdiv(batch.max_kv_tokens, layout.page_tokens)
    if window:
        pages = min(pages, triton.cdiv(window + batch.max_query_tokens - 2, layout.page_tokens) + 1)
    programs = batch.sequences * layout.kv_heads * triton.cdiv(rows, tile)
    wanted = triton.cdiv(multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, programs)
    splits = max(1, min(wanted, pages // _MIN_PAGES_PER_SPLIT, _MAX_SPLITS))
    pages_per_split = max(1, triton.cdiv(pages, splits))
    small = layout.head_dim * layout.page_tokens <= 64 * 64 and layout.uses(Codes.INT4)
    return Tiling(
        rows=tile,
        splits=max(1, triton.cdiv(pages, pages_per_split)),
        pages_per_split=pages_per_split,
        warps=1 if small or layout.page_tokens == 16 else 2,  # 4 would form a warpgroup: wgmma, byte gathers
    )


def launch_decode(
    cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec, multiprocessors: int
) -> Tensor:
    """Transform Q, attend in splits, combine them, transform the output."""
    tiling = plan_decode(cache, q_TQD.shape[1], batch, spec.window, multiprocessors)
    dtype = q_TQD.dtype if cache.v_transform.identity else torch.float32
    q = q_TQD if cache.k_transform.identity else cache.k_transform.query(q_TQD)
    q = q if q.stride(2) == 1 else q.contiguous()
    lse = q.new_empty((*q.shape[:2], tiling.splits), dtype=torch.float32)
    partial_dtype = dtype if tiling.splits == 1 else torch.float32
    partial = q.new_empty((*q.shape[:2], tiling.splits, q.shape[2]), dtype=partial_dtype)
    launch_attend(cache, q, batch, spec, tiling, partial, lse)
    if tiling.splits == 1:
        out_TQD = partial.squeeze(2)
    else:
        out_TQD = q.new_empty(q.shape, dtype=dtype)
        _launch_combine(partial, lse, out_TQD)
    return out_TQD if cache.v_transform.identity else cache.v_transform.output(out_TQD).to(q_TQD.dtype)


def _launch_combine(partial_TQXD: Tensor, lse_TQX: Tensor, out_TQD: Tensor) -> None:
    """X splits."""
    tokens, heads, splits, head_dim = partial_TQXD.shape
    _combine_kernel[(tokens * heads,)](
        partial_TQXD, lse_TQX, out_TQD, splits, X=triton.next_power_of_2(splits), D=head_dim, num_warps=2
    )


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
