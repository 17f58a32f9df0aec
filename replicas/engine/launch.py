"""Launches a step: lays it out, runs it and starts sampling. Changes no state of the engine."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from torch import Tensor

from quire.replicas.engine.blocks import Copier
from quire.replicas.engine.jobs import Job, LaunchedStep, last_rows, lay_out, prompt_logprobs, prompt_part
from quire.replicas.engine.sampler import start_sampling
from quire.replicas.engine.step_clock import Part, StepClock
from quire.replicas.request import TokenLogprob
from quire.replicas.step_batch import StepBatch


class StepExecutor(Copier, Protocol):
    """Runs a step on all shards."""

    @property
    def overlaps(self) -> bool:
        """Tell whether `run` returns before the step is computed, so that the next one can be planned."""

    def run(self, batch: StepBatch, drawn: Tensor | None = None) -> Tensor:
        """Compute fp32 logits [R, V] of the batch's rows, valid until the next call. Raises ReplicaDied.

        `drawn`: int64 tokens of the previous step, for the batch's negative token ids.
        """

    def can_go_on(self) -> bool:
        """Tell whether another step can be computed after one has raised."""


def launch(
    executor: StepExecutor,
    jobs: Seq[Job],
    before: LaunchedStep | None,
    *,
    page_tokens: int,
    time: StepClock,
    now_s: float,
) -> tuple[LaunchedStep, list[list[TokenLogprob]]]:
    """Start a step, while `before` still runs, and return prompt log-probabilities of every job.

    If this raises, nothing has changed but cells of the jobs' pages, which are written again before they are
    read.
    """
    drawn_R = before.samples.tokens_R if before and before.samples else None
    logits_RV = executor.run(lay_out(jobs, page_tokens, before), drawn_R)
    learned = prompt_logprobs(jobs, logits_RV)
    time.ended(Part.FORWARD)
    due = [job.seq for job in jobs if job.due]
    samples = start_sampling(last_rows(jobs, logits_RV), due) if due else None
    row_of = {seq.id: row for row, seq in enumerate(due)}
    time.ended(Part.SAMPLE)
    return LaunchedStep(jobs, samples, row_of, *prompt_part(jobs), now_s), learned
