"""An engine of a model with random weights, its whole pool full of random pages, and decode steps over it.

Legend: S sequences, M pages of each, N pages in the pool, B bytes, T tokens.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.models import Model
from quire.kernels.cache_view import LayerCache
from quire.kernels.layout import PageLayout
from quire.kernels.transform import default_transform
from quire.kernels.write import write_kv
from quire.replicas.config import SchedulerConfig
from quire.replicas.llm import LLM
from quire.replicas.runner.shard import Shard
from quire.replicas.step_batch import Ints, StepBatch

T = TypeVar("T")

_PATTERN_PAGES = 64
"""Pages of random numbers that repeat over the pool: far apart, so that no cache gains by it."""


def in_fresh_process(
    call: Callable[..., T], *args: object, environment: Mapping[str, str] | None = None
) -> T:
    """What `call` returns in a process of its own: one engine's memory, graphs and compiled code leave with
    it, and the next sizes its pool from an empty card. Both `call` and its result are pickled.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=_set_environment,
        initargs=(dict(environment or {}),),
    ) as pool:
        return pool.submit(call, *args).result()


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def random_engine(model: Model, kv: str, scheduler: SchedulerConfig | None = None) -> LLM:
    """Ready to step, with a pool sized by itself and full of finite numbers. Nothing is cached in it."""
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(model.save(folder), kv=kv, weights="random", scheduler=scheduler)
    shard = shard_of(llm)
    fill_pages(shard.pool, shard.layout)
    return llm


def shard_of(llm: LLM) -> Shard:
    """The one shard of an engine, to be stepped while the engine does nothing."""
    return llm._executor.shard


def fill_pages(pool_NB: Tensor, layout: PageLayout) -> None:
    """Write random K and V into the first pages as a step would, then repeat those pages."""
    pages = min(_PATTERN_PAGES, len(pool_NB))
    slots_T = torch.arange(pages * layout.page_tokens, device=pool_NB.device)
    shape = 2, len(slots_T), layout.kv_heads, layout.head_dim
    for layer, fmt in enumerate(layout.layers):
        cache = LayerCache(pool_NB[:pages], layout, layer, default_transform(fmt.k), default_transform(fmt.v))
        k_THD, v_THD = torch.randn(shape, dtype=torch.bfloat16, device=pool_NB.device)
        write_kv(cache, k_THD, v_THD, slots_T)
    for first in range(pages, len(pool_NB), pages):
        part_NB = pool_NB[first : first + pages]
        part_NB.copy_(pool_NB[: len(part_NB)])


def decode_steps(
    num_pages: int, page_tokens: int, sequences: int, tokens: int, steps: int, vocabulary: int
) -> list[StepBatch]:
    """Consecutive decode steps; in the last one every sequence has `tokens`.

    Every place of the page table is a page of its own, chosen at random from the whole pool.
    Raises ValueError where the pool has too few.
    """
    pages = -(-tokens // page_tokens)
    if sequences * pages > num_pages:
        raise ValueError(f"{sequences} x {pages} pages are needed, the pool has {num_pages}")
    rng = np.random.default_rng(0)
    table_SM = rng.permutation(num_pages)[: sequences * pages].reshape(sequences, pages)
    return [
        _decode_step(table_SM, length, page_tokens, rng.integers(0, vocabulary, sequences))
        for length in range(tokens - steps + 1, tokens + 1)
    ]


def _decode_step(table_SM: Ints, tokens: int, page_tokens: int, ids_S: Ints) -> StepBatch:
    sequences, at = len(table_SM), tokens - 1
    return StepBatch(
        token_ids_T=ids_S,
        positions_T=np.full(sequences, at),
        slots_T=table_SM[:, at // page_tokens] * page_tokens + at % page_tokens,
        query_start_S1=np.arange(sequences + 1),
        kv_tokens_S=np.full(sequences, tokens),
        page_table_SM=table_SM[:, : at // page_tokens + 1],
        logit_rows_R=np.arange(sequences),
    )


def forwards(shard: Shard, batches: Sequence[StepBatch]) -> list[Callable[[], Tensor]]:
    """One call of `forward` a step."""

    def call(batch: StepBatch) -> Callable[[], Tensor]:
        return lambda: shard.forward(batch)

    return [call(batch) for batch in batches]
