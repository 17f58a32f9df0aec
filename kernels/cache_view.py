"""The arguments of every operation on pages: one layer's place in the pool, and which tokens read what.

Tensor legend of this folder: N pages in the pool, B bytes, P tokens per page, T tokens of the step
(all sequences, one after the other), S sequences, M pages per sequence at most, H kv heads, Q query
heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.kernels.formats import Codes, FormatError, LayerFormat
from quire.kernels.layout import Cell, PageLayout
from quire.kernels.transform import SideTransform


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's K and V inside a pool: all that a kernel needs to find, read and write its cells."""

    pool_NB: Tensor
    """uint8 [num_pages, page_bytes], contiguous."""
    layout: PageLayout
    layer: int
    k_transform: SideTransform = field(default_factory=SideTransform)
    v_transform: SideTransform = field(default_factory=SideTransform)

    def __post_init__(self) -> None:
        pool = self.pool_NB
        if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.shape[1] != self.layout.page_bytes:
            raise ValueError(
                f"a pool is uint8 [num_pages, {self.layout.page_bytes}], got {pool.dtype} {tuple(pool.shape)}"
            )
        if not pool.is_contiguous():
            raise ValueError("a pool must be contiguous")
        if self.layout.uses(Codes.FP32) and pool.device.type != "cpu":
            raise FormatError("fp32 KV is the exact CPU passthrough; on a GPU choose bf16 or fewer bits")

    @property
    def cell(self) -> Cell:
        return self.layout.cells[self.layer]

    @property
    def format(self) -> LayerFormat:
        return self.layout.layers[self.layer]


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """Which tokens of a step belong to which sequence, and where that sequence's pages are."""

    query_start_S1: Tensor
    """int32 [S + 1]: sequence s owns the step's tokens query_start[s] .. query_start[s + 1]."""
    kv_tokens_S: Tensor
    """int32 [S]: tokens of the sequence in its pages once this step's are written. Its queries are the last
    of them: query row i of n is at position kv_tokens - n + i."""
    page_table_SM: Tensor
    """int32 [S, M]: page ids in token order; entries past the sequence's last page are never read."""
    slots_T: Tensor
    """int64 [T]: page * page_tokens + token within the page, where each new token's K and V go."""
    max_query_tokens: int
    max_kv_tokens: int

    @property
    def sequences(self) -> int:
        return self.kv_tokens_S.shape[0]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What distinguishes one layer's attention from another's."""

    scale: float
    window: int | None = None
    """Sliding window in tokens, the query's own included: key j is seen iff 0 <= i - j < window."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap)."""

    def check(self, cache: LayerCache) -> None:
        """Raise FormatError where the stored keys cannot serve this attention."""
        if self.softcap and cache.k_transform.shift_HD is not None:
            raise FormatError(
                f"layer {cache.layer}: a shift of K changes the result under a logit soft-cap; "
                "choose a K transform without shift (hadamard or identity) for this model"
            )
