"""Runs the largest step to measure how much of a GPU is left for pages.

torch's allocator keeps the memory of that step, so that no admitted step needs more from the device.
"""

from __future__ import annotations

import numpy as np
import torch

from quire.kernels.sampling import Draw, Filters, logprobs, sample
from quire.replicas.model.forward import ForwardPass
from quire.replicas.model.step import StepBuilder
from quire.replicas.step_batch import StepBatch

_HISTORY_TOKENS = 16384
"""Attention's workspace does not grow beyond this: `prefill_library.py` processes history in pieces."""


def run_largest_step(
    forward: ForwardPass, builder: StepBuilder, *, tokens: int, rows: int, max_model_tokens: int
) -> None:
    """Run a step of `tokens` tokens and `rows` rows of logits with the most memory. Writes to no page."""
    batch = largest_step(tokens, rows, max_model_tokens, builder.caches[0].layout.page_tokens)
    logits_RV = forward(builder.build(batch))
    count, device = len(logits_RV), builder.device
    ones = torch.ones(count, device=device)
    filters = Filters(torch.full((count,), 50, device=device), ones * 0.9, ones * 0.01)
    drawn = sample(logits_RV, [Draw(torch.arange(count, device=device), ones, ones.double() * 0.5, filters)])
    logprobs(logits_RV, drawn, 20)
    torch.cuda.synchronize(device)


def largest_step(tokens: int, rows: int, max_model_tokens: int, page_tokens: int) -> StepBatch:
    """Build chunks as long as sequences may be, each after a long history; every page is page 0. Pure."""
    lengths = [max_model_tokens] * (tokens // max_model_tokens) + [tokens % max_model_tokens]
    new_S = np.array(sorted(n for n in lengths if n), dtype=np.int64)
    kv_tokens_S = np.minimum(new_S + _HISTORY_TOKENS, max_model_tokens)
    positions = [np.arange(kv - new, kv) for new, kv in zip(new_S, kv_tokens_S, strict=True)]
    return StepBatch(
        token_ids_T=np.zeros(tokens, dtype=np.int64),
        positions_T=np.concatenate(positions),
        slots_T=np.full(tokens, -1, dtype=np.int64),
        query_start_S1=np.cumsum([0, *new_S]),
        kv_tokens_S=kv_tokens_S,
        page_table_SM=np.zeros((len(new_S), -(-int(kv_tokens_S.max()) // page_tokens)), dtype=np.int64),
        logit_rows_R=np.arange(tokens)[-rows:],
    )
