"""The operations on pages as a CPU serves them."""

from __future__ import annotations

from torch import Tensor

from quire.kernels.paged import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.ref.paged import attend_ref, write_kv_ref


def backend() -> str:
    """Which code serves pages on this machine's CPU."""
    return "reference"


def write_kv(cache: LayerCache, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
    """Transform, quantize and store each token's K and V at its slot; a slot of -1 stores nothing."""
    write_kv_ref(cache, k_THD, v_THD, slots_T)


def attend(cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Causal attention of every query row over its sequence's pages. [T, Q, D] in q's type."""
    return attend_ref(cache, q_TQD, batch, spec).to(q_TQD.dtype)
