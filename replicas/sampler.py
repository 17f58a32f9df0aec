"""The sampling parameters of a step's sequences, laid out as tensors, and what was drawn from them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels.sampling import Draw, logprobs, penalize_, sample, uniform
from quire.replicas.request import TokenLogprob
from quire.replicas.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one sequence."""

    token: int
    logprob: TokenLogprob | None


def sample_step(
    logits_RV: Tensor, sequences: Seq[Sequence], end_tokens: frozenset[int]
) -> list[Sampled | None]:
    """Draw one token for each sequence from its row of fp32 logits.

    None marks a row that is not finite: a fault of the shard, never to be turned into a token.
    Log-probabilities are taken before temperature, penalties and bans.
    """
    finite = logits_RV.amax(-1).isfinite().tolist()
    params = [seq.request.sampling for seq in sequences]
    device = logits_RV.device
    adjusted = logits_RV
    if any(map(_adjusts, sequences)):
        adjusted = logits_RV.clone()
        for row, seq in enumerate(sequences):
            _adjust_(adjusted[row], seq, end_tokens)
    draws = [
        uniform(seq.progress.seed + seq.index, seq.output_tokens) if p.temperature else 0.0
        for seq, p in zip(sequences, params, strict=True)
    ]
    tokens_R = sample(
        adjusted,
        Draw(
            temperature_R=torch.tensor([p.temperature for p in params], device=device),
            top_k_R=torch.tensor([p.top_k for p in params], device=device),
            top_p_R=torch.tensor([p.top_p for p in params], device=device),
            min_p_R=torch.tensor([p.min_p for p in params], device=device),
            uniform_R=torch.tensor(draws, dtype=torch.float64, device=device),
        ),
    )
    tokens = tokens_R.tolist()
    found: dict[int, TokenLogprob] = {}
    wanted = [row for row, p in enumerate(params) if p.logprobs is not None]
    if wanted:
        counts = [params[row].logprobs or 0 for row in wanted]
        found = dict(zip(wanted, token_logprobs(logits_RV[wanted], tokens_R[wanted], counts), strict=True))
    return [
        Sampled(token, found.get(row)) if ok else None
        for row, (token, ok) in enumerate(zip(tokens, finite, strict=True))
    ]


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, counts: Seq[int]) -> list[TokenLogprob]:
    """The log-probability of each row's token and of its `counts[row]` likeliest ones."""
    own, ids, values = (x.tolist() for x in logprobs(logits_RV, tokens_R, max(counts)))
    return [
        TokenLogprob(token, own[row], tuple(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, (token, count) in enumerate(zip(tokens_R.tolist(), counts, strict=True))
    ]


def _adjusts(seq: Sequence) -> bool:
    p = seq.request.sampling
    penalized = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
    return bool(penalized) or seq.output_tokens < p.min_tokens


def _adjust_(logits_V: Tensor, seq: Sequence, end_tokens: frozenset[int]) -> None:
    p, device = seq.request.sampling, logits_V.device
    if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
        output = torch.tensor(list(seq.output_counts), dtype=torch.long, device=device)
        penalize_(
            logits_V,
            torch.tensor(sorted(set(seq.tokens)), device=device),
            output,
            torch.tensor(list(seq.output_counts.values()), dtype=logits_V.dtype, device=device),
            repetition=p.repetition_penalty,
            presence=p.presence_penalty,
            frequency=p.frequency_penalty,
        )
    if seq.output_tokens < p.min_tokens:
        logits_V[list(end_tokens.union(p.stop_token_ids))] = float("-inf")
