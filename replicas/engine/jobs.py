"""What each sequence of a step computes, and its layout for the shards.

Values only: the engine decides, the executor computes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from torch import Tensor

from quire.replicas.engine.sampler import Samples, token_logprobs
from quire.replicas.engine.scheduler import SeqId
from quire.replicas.engine.sequence import Sequence
from quire.replicas.request import TokenLogprob
from quire.replicas.step_batch import StepBatch


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence's part of a step."""

    seq: Sequence
    start: int
    """The number of its tokens that were computed before."""
    tokens: int
    rows: range
    """Tokens of its part whose logits are needed; 0 is the first computed in this step."""
    due: bool
    """Whether its next token is drawn."""
    evictions: int
    """The sequence's evictions when the step was launched."""

    @staticmethod
    def next_of(seq: Sequence, tokens: int) -> Job:
        """Make the job of a sequence's next `tokens` tokens, with logits of its last token."""
        due = seq.computed + tokens == seq.length
        last = tokens if due else 0
        rows = range(max(last - 1, 0), last)
        if seq.wants_prompt_logprobs:
            first = max(len(seq.prompt_logprobs) - seq.computed, 0)
            rows = range(first, max(last, min(tokens, seq.prompt_tokens - 1 - seq.computed)))
        return Job(seq, seq.computed, tokens, rows, due, seq.evictions)

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True, eq=False, slots=True)
class LaunchedStep:
    """A step that the device computes or has computed."""

    jobs: Seq[Job]
    samples: Samples | None
    row_of: dict[SeqId, int]
    """Each sequence's row in the samples."""
    prompt_tokens: int
    """The number of prompt tokens in the step."""
    prompt_before: float
    """The mean number of tokens that precede a prompt token in its sequence."""
    launched_s: float


def lay_out(jobs: Seq[Job], page_tokens: int, before: LaunchedStep | None) -> StepBatch:
    """Lay out the step's arrays. `before`: the step whose tokens are not known yet, if any."""
    positions = [np.arange(job.start, job.end) for job in jobs]
    starts = np.cumsum([0, *(job.tokens for job in jobs)])
    table_SM = np.zeros((len(jobs), max(len(job.seq.pages) for job in jobs)), dtype=np.int64)
    for row, job in enumerate(jobs):
        table_SM[row, : len(job.seq.pages)] = job.seq.page_row()
    slots = [
        table_SM[row, at // page_tokens] * page_tokens + at % page_tokens for row, at in enumerate(positions)
    ]
    tokens = [t for job in jobs for t in _tokens(job, before)]
    rows = [start + row for start, job in zip(starts, jobs, strict=False) for row in job.rows]
    return StepBatch(
        token_ids_T=np.array(tokens, dtype=np.int64),
        positions_T=np.concatenate(positions),
        slots_T=np.concatenate(slots),
        query_start_S1=starts,
        kv_tokens_S=np.array([job.end for job in jobs]),
        page_table_SM=table_SM,
        logit_rows_R=np.array(rows, dtype=np.int64),
    )


def prompt_part(jobs: Seq[Job]) -> tuple[int, float]:
    """Count the prompt tokens of jobs, and the mean number of tokens that precede one in its sequence."""
    tokens = before = 0
    for job in jobs:
        new = max(min(job.end, job.seq.prompt_tokens) - job.start, 0)
        tokens += new
        before += new * (2 * job.start + new) // 2
    return tokens, before / max(tokens, 1)


def last_rows(jobs: Seq[Job], logits_RV: Tensor) -> Tensor:
    """Select the step's logits from which next tokens are drawn."""
    ends = list(accumulate(len(job.rows) for job in jobs))
    rows = [end - 1 for job, end in zip(jobs, ends, strict=True) if job.due]
    return logits_RV if len(rows) == ends[-1] else logits_RV[rows]


def prompt_logprobs(jobs: Seq[Job], logits_RV: Tensor) -> list[list[TokenLogprob]]:
    """Compute the prompt log-probabilities of every job that wants them."""
    ends = list(accumulate(len(job.rows) for job in jobs))
    return [
        _of_prompt(job, logits_RV[end - len(job.rows) : end]) for job, end in zip(jobs, ends, strict=True)
    ]


def _of_prompt(job: Job, rows_RV: Tensor) -> list[TokenLogprob]:
    """Select the rows about prompt tokens: a row at position p is about token p + 1."""
    seq = job.seq
    first = job.start + job.rows.start
    of_prompt = min(job.start + job.rows.stop, seq.prompt_tokens - 1) - first
    if not (seq.wants_prompt_logprobs and job.rows and of_prompt > 0):
        return []
    tokens = seq.tokens[first + 1 : first + 1 + of_prompt]
    return token_logprobs(rows_RV[:of_prompt], tokens, seq.request.sampling.prompt_logprobs or 0)


def _tokens(job: Job, before: LaunchedStep | None) -> list[int]:
    """Return a job's token ids; one in flight is -1 - its place among those that the step before draws."""
    tokens = job.seq.tokens[job.start : job.end]
    if len(tokens) < job.tokens:
        assert before is not None, f"sequence {job.seq.id} waits for a token that no step draws"
        tokens.append(-1 - before.row_of[job.seq.id])
    return tokens
