"""Samples the next tokens of a step's sequences from its logits.

The device works meanwhile: `start_sampling` enqueues, `Samples.collect` waits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.kernels.sampling import Draw, Filters, logprobs, penalize_, sample, uniform
from quire.replicas.engine.sequence import Sequence
from quire.replicas.request import ResolvedSampling, TokenLogprob
from quire.replicas.staging import Array, stage


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one sequence."""

    token: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, eq=False)
class Samples:
    """The tokens of a step, perhaps still being computed."""

    tokens_R: Tensor
    """int64, on the device of the logits: the input of the next step."""
    _on_host: tuple[Tensor, ...]
    """Tokens, whether rows were finite, and logprobs where requested: own, most probable ids, theirs."""
    _counts: dict[int, int]
    """Rows that want logprobs, in order, and of how many most probable tokens."""
    _done: torch.cuda.Event | None

    def collect(self) -> list[Sampled | None]:
        """Wait for the tokens; None for a row that is not finite, which is an error of the shard."""
        if self._done is not None:
            self._done.synchronize()
        tokens, finite, *found = (x.tolist() for x in self._on_host)
        wanted = _with_likeliest(tokens, self._counts, found) if found else {}
        return [
            Sampled(token, wanted.get(row)) if ok else None
            for row, (token, ok) in enumerate(zip(tokens, finite, strict=True))
        ]


def start_sampling(logits_RV: Tensor, sequences: Seq[Sequence]) -> Samples:
    """Start to draw one token for each sequence from its row of fp32 logits, which are not read later.

    Log-probabilities are taken before temperature, penalties and bans.
    """
    device = logits_RV.device
    params = [seq.progress.sampling for seq in sequences]
    adjusted = logits_RV
    if any(map(_adjusts, sequences)):
        adjusted = logits_RV.clone()
        for row, seq in enumerate(sequences):
            _adjust_(adjusted[row], seq)
    tokens_R = sample(adjusted, _draws(sequences, params, device))
    results = [tokens_R, logits_RV.amax(-1).isfinite()]
    counts = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None}
    if counts:
        rows = stage({"rows": np.array(list(counts), dtype=np.int64)}, device)["rows"]
        results += logprobs(logits_RV[rows], tokens_R[rows], max(counts.values()))
    done = None
    if device.type == "cuda":
        results = [torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, True) for x in results]
        done = torch.cuda.Event()
        done.record()
    return Samples(tokens_R, tuple(results), counts, done)


def token_logprobs(logits_RV: Tensor, tokens: Seq[int], count: int) -> list[TokenLogprob]:
    """Return log-probabilities of each row's given token and of its `count` most probable ones."""
    tokens_R = torch.tensor(tokens, device=logits_RV.device)
    found = [x.tolist() for x in logprobs(logits_RV, tokens_R, count)]
    return list(_with_likeliest(tokens, dict.fromkeys(range(len(tokens)), count), found).values())


def needs_tokens(seq: Sequence) -> bool:
    """Tell whether sampling the next token needs the previous tokens (penalties, min_tokens)."""
    p = seq.progress.sampling
    return bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)


def _with_likeliest(
    tokens: Seq[int], counts: dict[int, int], found: Seq[list[Any]]
) -> dict[int, TokenLogprob]:
    """Convert `found` (own log-probability, most probable ids and theirs) for the rows of `counts`."""
    own, ids, values = found
    return {
        row: TokenLogprob(tokens[row], own[at], tuple(zip(ids[at][:count], values[at][:count], strict=True)))
        for at, (row, count) in enumerate(counts.items())
    }


def _draws(sequences: Seq[Sequence], params: Seq[ResolvedSampling], device: torch.device) -> list[Draw]:
    """Group the rows that draw by whether they filter: a token must not depend on its batch."""
    drawn = [row for row, p in enumerate(params) if p.temperature]
    groups = [[row for row in drawn if _filters(params[row]) == filtered] for filtered in (False, True)]
    draws = []
    for filtered, rows in enumerate(groups):
        if rows:
            some = stage(_columns([sequences[r] for r in rows], [params[r] for r in rows], rows), device)
            filters = Filters(some["top_k"], some["top_p"], some["min_p"]) if filtered else None
            draws.append(Draw(some["rows"], some["temperature"], some["uniform"], filters))
    return draws


def _filters(p: ResolvedSampling) -> bool:
    return bool(p.top_k or p.top_p < 1 or p.min_p)


def _columns(sequences: Seq[Sequence], params: Seq[ResolvedSampling], rows: list[int]) -> dict[str, Array]:
    draws = [uniform(seq.progress.seed + seq.index, seq.output_tokens + seq.in_flight) for seq in sequences]
    return {
        "rows": np.array(rows, dtype=np.int64),
        "temperature": np.array([p.temperature for p in params], dtype=np.float32),
        "uniform": np.array(draws, dtype=np.float64),
        "top_k": np.array([p.top_k for p in params], dtype=np.int64),
        "top_p": np.array([p.top_p for p in params], dtype=np.float32),
        "min_p": np.array([p.min_p for p in params], dtype=np.float32),
    }


def _adjusts(seq: Sequence) -> bool:
    return needs_tokens(seq) or seq.output_tokens + seq.in_flight < seq.progress.sampling.min_tokens


def _adjust_(logits_V: Tensor, seq: Sequence) -> None:
    p, device = seq.progress.sampling, logits_V.device
    if needs_tokens(seq):
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
    if seq.output_tokens + seq.in_flight < p.min_tokens:
        logits_V[list(seq.progress.end_tokens)] = float("-inf")
