"""From logits to tokens: penalties, filters, the draw, and log-probabilities.

Every row is treated on its own and by nothing but its own numbers, so that a token does not depend on
which requests share its step. Torch operations only; the same code runs on CPU and GPU.

Tensor legend: R rows (one per sequence that gets a token), V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Draw:
    """How each row's token is chosen."""

    temperature_R: Tensor
    """fp32; 0 takes the likeliest token."""
    top_k_R: Tensor
    """int64; 0 keeps all."""
    top_p_R: Tensor
    """fp32 in (0, 1]."""
    min_p_R: Tensor
    """fp32 in [0, 1]."""
    uniform_R: Tensor
    """fp64 in [0, 1): the one random number a row needs (see `uniform`)."""


def uniform(seed: int, position: int) -> float:
    """The random number of one output position: the same on every machine and in every batch."""
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


def sample(logits_RV: Tensor, draw: Draw) -> Tensor:
    """One token per row, int64 [R]. Logits are fp32 and finite except for -inf of forbidden tokens."""
    tokens_R = logits_RV.argmax(-1)
    drawn = draw.temperature_R.gt(0).nonzero().squeeze(-1)
    if drawn.numel():
        tokens_R[drawn] = _draw(logits_RV[drawn], draw, drawn)
    return tokens_R


def logprobs(logits_RV: Tensor, tokens_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each row's token [R], and and of its k likeliest [R, K]."""
    all_RV = logits_RV.log_softmax(-1)
    top = all_RV.topk(min(k, all_RV.shape[-1]), dim=-1)
    return all_RV.gather(-1, tokens_R[:, None]).squeeze(-1), top.indices, top.values


def _draw(logits_RV: Tensor, draw: Draw, rows: Tensor) -> Tensor:
    """Filter, then invert the cumulative distribution over the tokens sorted from likeliest down."""
    scaled, order_RV = (logits_RV / draw.temperature_R[rows, None]).sort(dim=-1, descending=True, stable=True)
    probs_RV = scaled.double().softmax(-1)
    rank_V = torch.arange(probs_RV.shape[-1], device=probs_RV.device)
    top_k_R1 = draw.top_k_R[rows, None]
    keep = (top_k_R1 == 0) | (rank_V < top_k_R1)
    kept = probs_RV * keep
    before = kept.cumsum(-1) - kept
    keep &= before < draw.top_p_R[rows, None] * kept.sum(-1, keepdim=True)  # top-p of what top-k left
    keep &= probs_RV >= draw.min_p_R[rows, None] * probs_RV[:, :1]
    cumulative = (probs_RV * keep).cumsum(-1)
    target = draw.uniform_R[rows, None] * cumulative[:, -1:]
    last_kept = (keep * rank_V).amax(-1, keepdim=True)
    choice = (cumulative <= target).sum(-1, keepdim=True).minimum(last_kept)
    return order_RV.gather(-1, choice).squeeze(-1)
