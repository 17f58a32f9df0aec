"""Layers of random K and V on the device: as pages in random order, and contiguous for the library.

A case has enough layers for its data to be several times the cache (L2), and every timed call takes the next
layer: what a model's step does, and the only honest reading of bandwidth.

Legend: B sequences, L tokens of each, H kv heads, G query heads of each, D head_dim, Q query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.decode import decode_attention, plan_batch
from quire.kernels.decode_plan import DecodePlan
from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout
from quire.kernels.transform import default_transform
from quire.kernels.write import write_kv, write_step

_COLD_BYTES = 512 << 20
_MOST_LAYERS = 64
_WRITE_TOKENS = 1 << 16


@dataclass(frozen=True)
class Shape:
    """Heads, lengths and pages of a case; the last `rows` tokens of each sequence are its queries."""

    B: int
    L: int
    rows: int = 1
    H: int = 8
    G: int = 4
    D: int = 128
    page_tokens: int = 64
    ragged: bool = False
    """Lengths spread evenly over 0 .. 2 L instead of all L."""

    def __str__(self) -> str:
        extra = f" rows={self.rows}" * (self.rows > 1) + " ragged" * self.ragged
        return f"{self.H * self.G}/{self.H}/{self.D} B={self.B} L={self.L} P={self.page_tokens}{extra}"

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.L] * self.B
        return [max(self.rows, round(2 * self.L * (i + 0.5) / self.B)) for i in range(self.B)]

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.D**-0.5)

    def kv_bytes(self, policy: str) -> int:
        """What one layer's attention must read: the cells of the tokens there are, scales included."""
        (fmt,) = layer_formats(policy, 1)
        bits = 0.0
        for side in (fmt.k, fmt.v):
            bits += self.D * side.codes.bits + 8 * side.groups(self.D) * side.scale_bytes
        return round(sum(self.lengths) * self.H * bits / 8)

    def layers(self, policy: str) -> int:
        return max(1, min(_MOST_LAYERS, math.ceil(_COLD_BYTES / self.kv_bytes(policy))))


@dataclass(frozen=True, eq=False)
class Paged:
    """One case: a cache for every layer, one batch, one set of queries."""

    shape: Shape
    caches: list[LayerCache]
    batch: PagedBatch
    q_TQD: Tensor

    def decode_calls(self) -> list[Callable[[], Tensor]]:
        """One call a layer."""
        plan = self._plan()

        def call(cache: LayerCache) -> Callable[[], Tensor]:
            return lambda: decode_attention(cache, self.q_TQD, self.batch, self.shape.spec, plan)

        return [call(cache) for cache in self.caches]

    def step_calls(self, *, together: bool) -> list[Callable[[], Tensor]]:
        """One call a layer, which writes a token of each sequence and attends.

        together: Q is transformed in the launch of the write.
        """
        plan, shape, q_TQD = self._plan(), self.shape, self.q_TQD
        k_THD, v_THD = torch.randn(2, shape.B, shape.H, shape.D, dtype=torch.bfloat16, device="cuda")
        slots_T = self.batch.page_table_SM[:, 0].long() * shape.page_tokens + 5

        def call(cache: LayerCache) -> Callable[[], Tensor]:
            def step() -> Tensor:
                q = write_step(cache, q_TQD, k_THD, v_THD, slots_T)
                return decode_attention(
                    cache, q, self.batch, shape.spec, plan, transformed=True, dtype=q_TQD.dtype
                )

            def step_apart() -> Tensor:
                write_kv(cache, k_THD, v_THD, slots_T)
                return decode_attention(cache, q_TQD, self.batch, shape.spec, plan)

            return step if together else step_apart

        return [call(cache) for cache in self.caches]

    def _plan(self) -> DecodePlan:
        """Made before, once for all layers, as an engine does."""
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        return plan_batch(self.caches[0], self.q_TQD.shape[1], self.batch, self.shape.spec, multiprocessors)

    @classmethod
    def random(
        cls, shape: Shape, policy: str, layers: int, *, pages: int = 0, layer_major: bool = False
    ) -> Paged:
        """`pages` in the pool, of which the batch's are a random choice (0: as many as the batch needs)."""
        torch.manual_seed(0)
        needed_S = [math.ceil(n / shape.page_tokens) for n in shape.lengths]
        pages = max(pages, sum(needed_S))
        caches = _empty_caches(shape, policy, layers, pages, layer_major)
        order = torch.randperm(pages, device="cuda")[: sum(needed_S)].int().split(needed_S)
        table_SM = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
        slots_L = _slots(torch.cat(order), shape.page_tokens)
        for cache in caches:
            _fill(cache, slots_L)
        kv_tokens_S = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
        starts_S1 = torch.arange(shape.B + 1, dtype=torch.int32, device="cuda") * shape.rows
        tokens = shape.B * shape.rows
        batch = PagedBatch(starts_S1, kv_tokens_S, table_SM, slots_L[:tokens], shape.rows, max(shape.lengths))
        q_TQD = torch.randn(tokens, shape.H * shape.G, shape.D, device="cuda").bfloat16()
        return cls(shape, caches, batch, q_TQD)


def _empty_caches(shape: Shape, policy: str, layers: int, pages: int, layer_major: bool) -> list[LayerCache]:
    """Page-major: one pool, all layers in a page. Layer-major: a pool a layer."""
    (fmt,) = layer_formats(policy, 1)
    transforms = default_transform(fmt.k), default_transform(fmt.v)
    if layer_major:
        layout = PageLayout((fmt,), shape.H, shape.D, shape.page_tokens)
        return [LayerCache(_pool(pages, layout), layout, 0, *transforms) for _ in range(layers)]
    layout = PageLayout((fmt,) * layers, shape.H, shape.D, shape.page_tokens)
    pool_NB = _pool(pages, layout)
    return [LayerCache(pool_NB, layout, layer, *transforms) for layer in range(layers)]


def _pool(pages: int, layout: PageLayout) -> Tensor:
    return torch.empty(pages, layout.page_bytes, dtype=torch.uint8, device="cuda")


def _slots(pages_M: Tensor, page_tokens: int) -> Tensor:
    token_P = torch.arange(page_tokens, device="cuda")
    return (pages_M.long()[:, None] * page_tokens + token_P).flatten()


def _fill(cache: LayerCache, slots_L: Tensor) -> None:
    """Random numbers in every slot, written as a step would."""
    layout = cache.layout
    for slots_T in slots_L.split(_WRITE_TOKENS):
        k_THD, v_THD = torch.randn(
            2, len(slots_T), layout.kv_heads, layout.head_dim, dtype=torch.bfloat16, device="cuda"
        )
        write_kv(cache, k_THD, v_THD, slots_T)
