"""Writes a step's new keys and values into their pages: transform, quantize, store.

Legend: see `paged.py`.
"""

from __future__ import annotations

from torch import Tensor

from quire.kernels import cpu
from quire.kernels.paged import LayerCache


def write_kv(cache: LayerCache, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
    """Store each token's K and V at its slot (`PagedBatch.slots_T`); a slot of -1 stores nothing.

    k_THD, v_THD: any floating type, untransformed, RoPE applied. Source: `ref.paged.write_kv_ref`.
    """
    cpu.write_kv(cache, k_THD, v_THD, slots_T)
