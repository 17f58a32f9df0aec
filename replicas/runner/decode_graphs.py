"""CUDA graphs of steps in which every sequence decodes one token: a whole step is one launch.

A graph is captured for a number of sequences and serves batches of that many and fewer, of any lengths: the
step's tokens, pages, lengths and attention plan are copied to where the graph reads them.

Names: S sequences, M pages per sequence at most, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.kernels.cache_view import PagedBatch
from quire.kernels.decode_plan import items_capacity
from quire.replicas.model.step import (
    ModelInputs,
    PagedStep,
    StepBuilder,
    StepPart,
    known_tokens,
    layer_plans,
    plan_arrays,
)
from quire.replicas.staging import Array, Packing, host_bytes
from quire.replicas.step_batch import Ints, StepBatch

Compute = Callable[[ModelInputs], Tensor]
"""Runs a forward pass: fp32 logits [R, V]."""


def graph_sizes(most: int) -> list[int]:
    """Choose the sizes of graphs: padding costs a quarter at most, and little in most steps."""
    sizes = [2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, most, 128)]
    return [*(size for size in sizes if size < most), max(most, 2)]


class DecodeGraphs:
    """The graphs of one shard."""

    def __init__(self, compute: Compute, builder: StepBuilder, max_sequences: int, max_pages: int) -> None:
        """Capture for up to `max_sequences`, each of up to `max_pages`; `compute` has run before."""
        sizes = graph_sizes(max_sequences)
        buffer_B = torch.zeros(
            _packing(builder, sizes[-1], max_pages).size_bytes, dtype=torch.uint8, device=builder.device
        )
        drawn_S = torch.zeros(sizes[-1], dtype=torch.int64, device=builder.device)
        memory = torch.cuda.graph_pool_handle()
        self._graphs = [  # the largest first: the others fit into its memory
            _Graph.capture(compute, builder, size, max_pages, buffer_B, drawn_S, memory)
            for size in reversed(sizes)
        ][::-1]
        self._sizes = sizes

    def run(self, batch: StepBatch, drawn: Tensor | None) -> Tensor | None:
        """Compute fp32 logits [R, V], valid until the next run; None for a step without a graph."""
        sequences = len(batch.kv_tokens_S)
        if not sequences == len(batch.token_ids_T) == len(batch.logit_rows_R) <= self._sizes[-1]:
            return None
        graph = self._graphs[bisect_left(self._sizes, sequences)]
        return graph.replay(batch, drawn)[:sequences]


@dataclass(frozen=True, eq=False)
class _Graph:
    """One captured step of `size` sequences."""

    graph: torch.cuda.CUDAGraph
    builder: StepBuilder
    packing: Packing
    size: int
    buffer_B: Tensor
    """The memory from which the graph reads its step."""
    drawn_S: Tensor
    """The memory from which it reads the tokens that the previous step drew."""
    logits_SV: Tensor

    @classmethod
    def capture(
        cls,
        compute: Compute,
        builder: StepBuilder,
        size: int,
        max_pages: int,
        buffer_B: Tensor,
        drawn_S: Tensor,
        memory: Any,
    ) -> _Graph:
        """Capture a graph. All share memory: one runs at a time, and its logits are read before the next."""
        packing = _packing(builder, size, max_pages)
        host_B = host_bytes(packing.size_bytes, builder.device)
        _fill(packing.arrays(host_B), builder, _NOTHING, size)
        buffer_B[: host_B.numel()].copy_(host_B)
        staged = packing.tensors(buffer_B)
        compute(_inputs(builder, staged, drawn_S, size))  # compiles what this size needs, outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits_SV = compute(_inputs(builder, staged, drawn_S, size))
        return cls(graph, builder, packing, size, buffer_B, drawn_S, logits_SV)

    def replay(self, batch: StepBatch, drawn: Tensor | None) -> Tensor:
        host_B = host_bytes(self.packing.size_bytes, self.builder.device)
        _fill(self.packing.arrays(host_B), self.builder, batch, self.size)
        self.buffer_B[: host_B.numel()].copy_(host_B, non_blocking=True)
        if drawn is not None:
            self.drawn_S[: len(drawn)].copy_(drawn)
        self.graph.replay()
        return self.logits_SV


def _packing(builder: StepBuilder, size: int, max_pages: int) -> Packing:
    """Return the packing of the arrays of `size` sequences, each with up to `max_pages`."""
    arrays: dict[str, Array] = {
        **{name: np.zeros(size, dtype=np.int64) for name in ("token_ids", "positions", "slots", "rows")},
        "query_start": np.zeros(size + 1, dtype=np.int32),
        "kv_tokens": np.zeros(size, dtype=np.int32),
        "page_table": np.zeros((size, max_pages), dtype=np.int32),
        **_plans(builder, np.zeros(size, dtype=np.int64)),
    }
    return Packing.of(arrays)


def _plans(builder: StepBuilder, kv_tokens_S: Ints) -> dict[str, Array]:
    """Plan one new token for each sequence; one without tokens is padding and owns no work."""
    kinds, size = builder.kinds(1), len(kv_tokens_S)
    capacities = {kind: items_capacity(kind, size) for kind in kinds}
    return plan_arrays(kinds, np.ones(size, dtype=np.int64), kv_tokens_S, capacities)


def _fill(arrays: Mapping[str, Array], builder: StepBuilder, batch: StepBatch, size: int) -> None:
    """Lay out a batch for a graph; entries that no sequence reads are left as they are."""
    count, pages = batch.page_table_SM.shape
    for name, numbers, padding in (
        ("token_ids", batch.token_ids_T, 0),
        ("positions", batch.positions_T, 0),
        ("slots", batch.slots_T, -1),
        ("kv_tokens", batch.kv_tokens_S, 0),
    ):
        arrays[name][:count] = numbers
        arrays[name][count:] = padding
    arrays["rows"][:] = np.arange(size)
    arrays["query_start"][:] = np.arange(size + 1)
    arrays["page_table"][:count, :pages] = batch.page_table_SM
    for name, plan in _plans(builder, arrays["kv_tokens"].astype(np.int64)).items():
        arrays[name][...] = plan


def _inputs(builder: StepBuilder, staged: Mapping[str, Tensor], drawn_S: Tensor, size: int) -> ModelInputs:
    page_table_SM = staged["page_table"]
    batch = PagedBatch(
        query_start_S1=staged["query_start"],
        kv_tokens_S=staged["kv_tokens"],
        page_table_SM=page_table_SM,
        slots_T=staged["slots"],
        max_query_tokens=1,
        max_kv_tokens=page_table_SM.shape[1] * builder.caches[0].layout.page_tokens,
    )
    plans = layer_plans(builder.kinds(1), staged, len(builder.caches))
    step = PagedStep(builder.caches, (StepPart(slice(0, size), batch, True, plans),), staged["slots"])
    return ModelInputs(known_tokens(staged["token_ids"], drawn_S), staged["positions"], step, staged["rows"])


_NOTHING = StepBatch(
    token_ids_T=np.zeros(0, dtype=np.int64),
    positions_T=np.zeros(0, dtype=np.int64),
    slots_T=np.zeros(0, dtype=np.int64),
    query_start_S1=np.zeros(1, dtype=np.int64),
    kv_tokens_S=np.zeros(0, dtype=np.int64),
    page_table_SM=np.zeros((0, 0), dtype=np.int64),
    logit_rows_R=np.zeros(0, dtype=np.int64),
)
