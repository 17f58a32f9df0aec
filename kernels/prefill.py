"""Attention of a chunk of new tokens over its sequence's pages, its own among them.

Legend: see `paged.py`.
"""

from __future__ import annotations

from torch import Tensor

from quire.kernels import cpu
from quire.kernels.paged import AttentionSpec, LayerCache, PagedBatch


def prefill_attention(cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Causal attention of each sequence's last rows over all its pages: [T, Q, D] of q's type.

    The chunk attends to its own K and V as they were quantized. Source: `ref.paged.attend_ref`.
    """
    return cpu.attend(cache, q_TQD, batch, spec)
