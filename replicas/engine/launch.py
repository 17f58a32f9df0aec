"""One step's way to the shards and back: laid out, run, its draws begun. Changes no books."""

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
        """Whether `run` returns before the step is computed, so that the next can be planned meanwhile."""

    def run(self, batch: StepBatch, drawn: Tensor | None = None) -> Tensor:
        """fp32 logits [R, V] of the batch's wanted rows, good until the next call. Raises ReplicaDied.

        `drawn`: int64 tokens that the step before drew, for the batch's negative token ids.
        """

    def can_go_on(self) -> bool:
        """Whether another step can be computed, now that one has raised."""


def launch(
    executor: StepExecutor,
    jobs: Seq[Job],
    before: LaunchedStep | None,
    *,
    page_tokens: int,
    time: StepClock,
    now_s: float,
) -> tuple[LaunchedStep, list[list[TokenLogprob]]]:
    """Start a step, and say what every job's sequence learns of its prompt. `before` is still under way.

    If this raises, cells of the jobs' pages may have been written, which are written again before they are
    read; nothing else has changed.
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
