"""From logits to tokens: penalties, filters, the draw, and log-probabilities.

Every row depends on its own numbers only, so a token does not depend on which requests share its step.
Torch operations only; the same code runs on CPU and GPU.

Tensor legend: R rows (one per sequence that gets a token), D rows whose token is drawn, V vocabulary, K
most probable tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Draw:
    """How the tokens of some rows are drawn; all other rows are greedy."""

    rows_D: Tensor
    """int64: which rows."""
    temperature_D: Tensor
    """fp32, above 0."""
    uniform_D: Tensor
    """fp64 in [0, 1): the one random number a row needs (see `uniform`)."""
    filters: Filters | None = None
    """None keeps the whole vocabulary, which then need not be sorted."""


@dataclass(frozen=True, eq=False)
class Filters:
    """Which tokens a row may draw: the most probable ones, by three measures."""

    top_k_D: Tensor
    """int64; 0 keeps all."""
    top_p_D: Tensor
    """fp32 in (0, 1]."""
    min_p_D: Tensor
    """fp32 in [0, 1]."""


def uniform(seed: int, position: int) -> float:
    """Return the random number of one output position: the same on every machine and in every batch."""
    data = seed.to_bytes(16, "little", signed=True) + position.to_bytes(8, "little")
    word = hashlib.blake2b(data, digest_size=8, person=b"quire-draw").digest()
    return (int.from_bytes(word, "little") >> 11) / 2.0**53


def penalize_(
    logits_V: Tensor,
    seen: Tensor,
    output: Tensor,
    counts: Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Penalize one row in place.

    seen: distinct ids of prompt and output; output: distinct ids of the output; counts: how often each.
    """
    if repetition != 1.0:
        old = logits_V[seen]
        logits_V[seen] = torch.where(old > 0, old / repetition, old * repetition)
    logits_V[output] -= presence + frequency * counts


def sample(logits_RV: Tensor, draws: Sequence[Draw] = ()) -> Tensor:
    """Choose one token per row, int64 [R]. Logits are fp32 and finite except for -inf of forbidden tokens.

    Does not wait for a GPU.
    """
    tokens_R = logits_RV.argmax(-1)
    for draw in draws:
        scaled_DV = logits_RV[draw.rows_D] / draw.temperature_D[:, None]
        tokens_R[draw.rows_D] = _draw(scaled_DV, draw)
    return tokens_R


def logprobs(logits_RV: Tensor, tokens_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's log-probability of its token [R], and the k most probable tokens with theirs."""
    all_RV = logits_RV.log_softmax(-1)
    top = all_RV.topk(min(k, all_RV.shape[-1]), dim=-1)
    return all_RV.gather(-1, tokens_R[:, None]).squeeze(-1), top.indices, top.values


def _draw(scaled_DV: Tensor, draw: Draw) -> Tensor:
    """Invert the cumulative distribution: over the vocabulary, or over what the filters keep
    of it, sorted by descending probability.
    """
    if draw.filters is None:
        return _invert(scaled_DV.double().softmax(-1), draw.uniform_D)
    sorted_DV, order_DV = scaled_DV.sort(dim=-1, descending=True, stable=True)
    probs_DV = _filtered(sorted_DV.double().softmax(-1), draw.filters)
    return order_DV.gather(-1, _invert(probs_DV, draw.uniform_D)[:, None]).squeeze(-1)


def _filtered(probs_DV: Tensor, filters: Filters) -> Tensor:
    """Set sorted probabilities to zero where a filter removes the token."""
    rank_V = torch.arange(probs_DV.shape[-1], device=probs_DV.device)
    top_k_D1 = filters.top_k_D[:, None]
    keep = (top_k_D1 == 0) | (rank_V < top_k_D1)
    kept = probs_DV * keep
    before = kept.cumsum(-1) - kept
    keep &= before < filters.top_p_D[:, None] * kept.sum(-1, keepdim=True)  # top-p of what top-k left
    keep &= probs_DV >= filters.min_p_D[:, None] * probs_DV[:, :1]
    return probs_DV * keep


def _invert(weight_DV: Tensor, uniform_D: Tensor) -> Tensor:
    """Find the first place whose cumulative weight exceeds the random share of the total, int64 [D]."""
    cumulative_DV = weight_DV.cumsum(-1)
    target_D1 = uniform_D[:, None] * cumulative_DV[:, -1:]
    place_V = torch.arange(weight_DV.shape[-1], device=weight_DV.device)
    last_D = ((weight_DV > 0) * place_V).amax(-1)  # rounding may put the target at the total itself
    return (cumulative_DV <= target_D1).sum(-1).minimum(last_D)
