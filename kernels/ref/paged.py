"""References of the operations on pages: a kernel is correct iff it agrees with these.

Legend: see `kernels/cache_view.py`; L tokens of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.codec import decode, encode
from quire.kernels.formats import KVFormat


def write_kv_ref(cache: LayerCache, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
    """Transform, quantize and store each token's K and V at its slot; a slot of -1 stores nothing."""
    cell, fmt, tokens = cache.cell, cache.format, cache.layout.page_tokens
    kept = slots_T >= 0
    page_T, at_T = slots_T[kept] // tokens, slots_T[kept] % tokens
    k_THD, v_THD = cache.k_transform.store(k_THD[kept]), cache.v_transform.store(v_THD[kept])
    _store(cache, k_THD, fmt.k, cell.k_codes, cell.k_scales, page_T, at_T, transposed=False)
    _store(cache, v_THD, fmt.v, cell.v_codes, cell.v_scales, page_T, at_T, transposed=fmt.v.codes.quantized)


def read_kv_ref(cache: LayerCache, pages_M: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantize K and V of whole pages as stored (still transformed): two fp32 [M * P, H, D]."""
    cell, fmt = cache.cell, cache.format
    k_MHPD = _load(cache, fmt.k, cell.k_codes, cell.k_scales, pages_M, transposed=False)
    v_MHPD = _load(cache, fmt.v, cell.v_codes, cell.v_scales, pages_M, transposed=fmt.v.codes.quantized)
    return k_MHPD.transpose(1, 2).flatten(0, 1), v_MHPD.transpose(1, 2).flatten(0, 1)


def attend_ref(
    cache: LayerCache,
    q_TQD: Tensor,
    batch: PagedBatch,
    spec: AttentionSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Causal attention of every query row over its sequence's pages, computed in `dtype`. [T, Q, D]."""
    spec.check(cache)
    tokens = cache.layout.page_tokens
    q_TQD = cache.k_transform.query(q_TQD).to(dtype)
    out_TQD = torch.zeros_like(q_TQD)
    starts = batch.query_start_S1.tolist()
    for s, kv_tokens in enumerate(batch.kv_tokens_S.tolist()):
        rows = slice(starts[s], starts[s + 1])
        pages = batch.page_table_SM[s, : -(-kv_tokens // tokens)].long()
        k_LHD, v_LHD = (x[:kv_tokens].to(dtype) for x in read_kv_ref(cache, pages))
        out_TQD[rows] = attend_numbers(q_TQD[rows], k_LHD, v_LHD, spec)
    return cache.v_transform.output(out_TQD).to(dtype)


def attend_numbers(q_TQD: Tensor, k_LHD: Tensor, v_LHD: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of a sequence's last T tokens over all its keys and values, in their type."""
    group = q_TQD.shape[1] // k_LHD.shape[1]
    k_LQD, v_LQD = k_LHD.repeat_interleave(group, 1), v_LHD.repeat_interleave(group, 1)
    logits_QTL = torch.einsum("tqd,lqd->qtl", q_TQD, k_LQD) * spec.scale
    if spec.softcap:
        logits_QTL = spec.softcap * torch.tanh(logits_QTL / spec.softcap)
    n, length = q_TQD.shape[0], k_LHD.shape[0]
    at_T, at_L = (torch.arange(first, length, device=q_TQD.device) for first in (length - n, 0))
    distance_TL = at_T[:, None] - at_L[None, :]
    seen_TL = distance_TL >= 0
    if spec.window:
        seen_TL &= distance_TL < spec.window
    probs_QTL = logits_QTL.masked_fill(~seen_TL, float("-inf")).softmax(-1)
    return torch.einsum("qtl,lqd->tqd", probs_QTL, v_LQD)


def _store(
    cache: LayerCache,
    x_THD: Tensor,
    fmt: KVFormat,
    codes_at: int,
    scales_at: int,
    page_T: Tensor,
    at_T: Tensor,
    *,
    transposed: bool,
) -> None:
    tokens = x_THD.shape[0]
    codes_THB, scales = encode(x_THD.unsqueeze(2), fmt)  # one token a "page": [T, H, 1, D]
    codes_THB = codes_THB.squeeze(2)
    section = _section(cache, codes_at, cache.layout.codes_bytes(fmt))  # [N, H, bytes]
    width = codes_THB.shape[-1]
    page_T1, at_T1 = page_T[:, None], at_T[:, None]
    heads_1H = torch.arange(x_THD.shape[1], device=x_THD.device)[None]
    if transposed:
        section.unflatten(-1, (width, -1)).transpose(-1, -2)[page_T1, heads_1H, at_T1] = codes_THB
    else:
        section.unflatten(-1, (-1, width))[page_T1, heads_1H, at_T1] = codes_THB
    if scales is not None and tokens:
        groups = fmt.groups(cache.layout.head_dim)
        section = _section(cache, scales_at, cache.layout.scales_bytes(fmt))
        section = section.unflatten(-1, (groups, cache.layout.page_tokens, -1)).movedim(2, 3)
        section[page_T1, heads_1H, at_T1] = scales.squeeze(3)


def _load(
    cache: LayerCache, fmt: KVFormat, codes_at: int, scales_at: int, pages_M: Tensor, *, transposed: bool
) -> Tensor:
    """Dequantize one side of pages: fp32 [M, H, P, D]."""
    layout = cache.layout
    codes = _section(cache, codes_at, layout.codes_bytes(fmt))[pages_M]
    width = codes.shape[-1] // layout.page_tokens
    if transposed:
        codes = codes.unflatten(-1, (width, -1)).transpose(-1, -2)
    else:
        codes = codes.unflatten(-1, (-1, width))
    scales = None
    if groups := fmt.groups(layout.head_dim):
        scales = _section(cache, scales_at, layout.scales_bytes(fmt))[pages_M]
        scales = scales.unflatten(-1, (groups, layout.page_tokens, -1))
    return decode(codes, scales, fmt, layout.head_dim)


def _section(cache: LayerCache, offset: int, size: int) -> Tensor:
    """View one section of every page: uint8 [N, H, size]."""
    pages_NHB: Tensor = cache.pool_NB.unflatten(1, (cache.layout.kv_heads, cache.layout.head_bytes))
    return pages_NHB[:, :, offset : offset + size]
