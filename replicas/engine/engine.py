"""The step loop's body: take requests in, plan, launch one step, return the last one's events.

Single-threaded; `async_engine.py` gives it a thread, `llm.py` calls it directly. The sequences are in
`open_sequences.py`, the tensors are the executor's.

Where the executor overlaps, a step is planned and launched while the previous one computes: its tokens are
not known yet, the device hands them on (`StepBatch.token_ids_T`). Books run ahead of the device, which
executes in order; a sequence that turns out to have ended wastes its row of one step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace

from tokenizers import Tokenizer

from quire.kvstore.books.keys import KeySpace
from quire.kvstore.books.pool import PagePool
from quire.kvstore.peers.peer import Peer
from quire.replicas.admission import check_request
from quire.replicas.config import SchedulerConfig
from quire.replicas.engine.blame import Blame
from quire.replicas.engine.blocks import BlockStore
from quire.replicas.engine.jobs import Job, LaunchedStep
from quire.replicas.engine.launch import StepExecutor, launch
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.engine.meter import Meter
from quire.replicas.engine.open_sequences import OpenSequences
from quire.replicas.engine.prefix_waits import PrefixWaits
from quire.replicas.engine.pressure import Pressure
from quire.replicas.engine.sampler import Sampled, needs_tokens
from quire.replicas.engine.scheduler import SchedulerState, StepPlan, candidates, plan_step
from quire.replicas.engine.step_clock import Part
from quire.replicas.errors import Status
from quire.replicas.request import Event, Failure, ModelInfo, Request, RequestId
from quire.replicas.stats import EngineStats
from quire.replicas.step_batch import PROMPT_ROWS

log = logging.getLogger(__name__)


class Engine:
    """Requests in (`add`, `cancel`), events out (`step`)."""

    def __init__(
        self,
        executor: StepExecutor,
        info: ModelInfo,
        keys: KeySpace,
        scheduler: SchedulerConfig,
        max_step_tokens: int,
        tokenizer: Tokenizer | None,
        share: Callable[[PagePool], PrefixWaits] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share`: makes the ledger of an engine that shares blocks with other replicas."""
        self.info = info
        self.keys = keys
        self._executor = executor
        self._max_running, self._max_step_tokens = scheduler.max_running, max_step_tokens
        self._has_tokenizer = tokenizer is not None
        self._clock = clock
        self._blocks = BlockStore(executor, share)
        self._pool, self.waits = self._blocks.pool, self._blocks.waits
        self._meter = Meter(
            self._blocks, max_running=scheduler.max_running, page_tokens=info.page_tokens, clock=clock
        )
        self._open = OpenSequences(info, keys, tokenizer, self._blocks, self._meter)
        self._launched: LaunchedStep | None = None
        self._blame = Blame()
        self.stalled = False
        """Whether the last step had nothing to compute: whatever waits, waits for pages or other replicas."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything now: sequences that wait for their prefix do not count."""
        waiting = any(not self.waits.is_waiting(seq_id) for seq_id in self._open.waiting)
        running = self._open.running or self._launched or self._open.events
        return bool(waiting or running or self.waits.has_news)

    @property
    def hopeless(self) -> Exception | None:
        """The last error, if many requests in a row have failed with no token of any request between them."""
        return None if self._launched else self._blame.hopeless  # what is under way may bring one

    @property
    def queued(self) -> int:
        """How many sequences wait."""
        return len(self._open.waiting)

    def stats(self) -> EngineStats:
        return self._meter.stats(len(self._open.running), self.queued)

    @property
    def load(self) -> LoadReport:
        """The load at the end of the last step. From any thread."""
        return self._meter.load

    @property
    def pressure(self) -> Pressure:
        """The pressure a moment ago. From any thread."""
        return self._meter.pressure

    @property
    def peer(self) -> Peer:
        """Its part in the store: other threads bring messages to it."""
        return self.waits.peer

    def check(self) -> None:
        """Compare the pool's books with the pages the sequences hold. Raises IntegrityError."""
        self._blocks.check(page for seq in self._open for page in seq.pages)

    def validate(self, request: Request) -> None:
        """Refuse what can never be served. Raises InvalidRequest. From any thread."""
        check_request(request, self.info, pool_pages=self._pool.total, has_tokenizer=self._has_tokenizer)
        self._open.stop_rules.check(request.sampling)

    def add(self, request: Request) -> None:
        """Queue a request that `validate` has accepted."""
        self._meter.taken()
        with self._isolated(request.id):
            self._open.open(request, self._clock())

    def cancel(self, request_id: RequestId) -> None:
        """End a request; its pages are free before the next step. Unknown ids are ignored.

        Each output that was still open ends with an event, which has the text that was held back.
        """
        if removed := self._open.remove(request_id):
            with self._isolated(request_id):
                self._open.report_cancelled(removed, self._clock())

    def fail_running(self, status: Status, message: str) -> None:
        """End every request that is being computed with a Failure that says so."""
        for request_id in {seq.request.id for seq in self._open.running.values()}:
            self._open.fail(request_id, status, message, begun=True)

    def fail_all(self, status: Status, message: str) -> None:
        """End every open request with a Failure."""
        for request_id in {seq.request.id for seq in self._open}:
            self._open.fail(request_id, status, message)

    def step(self) -> tuple[Event, ...]:
        """Launch one step, if there is anything to do, and return all events since the last call.

        An error in one request ends that request. Raises ReplicaDied, or any other error that ends the
        engine; the caller then decides about the open requests (`fail_running`, `fail_all`).
        """
        running, waiting = self._open.running.values(), self._open.waiting.values()
        self._meter.time.start()
        self._open.expire(self._clock())
        self.waits.poll(self._clock(), self._meter.queued_tokens(running, waiting))
        self._meter.time.ended(Part.PLAN)
        before, self._launched = self._launched, None
        if before and any(map(needs_tokens, running)):
            self._complete(before)
            before = None
        jobs = self._execute(plan_step(self._state()))
        self._meter.time.ended(Part.PLAN)
        launched = self._launch(jobs, before)
        self.stalled = not (before or launched)
        if before:
            self._complete(before)
        if len(launched) == 1 and self._executor.overlaps:
            self._launched = launched[0]
        else:
            for step in launched:
                self._complete(step)
        self._meter.stepped(running, waiting, self._clock())
        return self.take_events()

    def take_events(self) -> tuple[Event, ...]:
        """Return the events since the last call."""
        events, self._open.events = tuple(self._open.events), []
        return events

    # ---- before the step

    def _state(self) -> SchedulerState:
        """Make the state to plan from. Blocks are looked up only where the step can reach a sequence."""
        ready = [seq for seq in self._open.waiting.values() if not self.waits.is_waiting(seq.id)]
        state = SchedulerState(
            running=[seq.as_running(self.info.max_model_tokens) for seq in self._open.running.values()],
            waiting=[seq.as_waiting(seq.found_blocks) for seq in ready],
            available_pages=self._pool.available,
            page_tokens=self.info.page_tokens,
            max_running=self._max_running,
            max_step_tokens=self._max_step_tokens,
        )
        reached = [self._open.waiting[seq.id] for seq in candidates(state)[: self._max_running]]
        return replace(state, waiting=[seq.as_waiting(*self._blocks.find(seq)) for seq in reached])

    def _execute(self, plan: StepPlan) -> list[Job]:
        """Move sequences and pages as planned. Cached blocks are taken before anything can evict them."""
        for seq_id in plan.preempt:
            self._open.preempt(seq_id)
        for seq_id in plan.admit:
            self._open.admit(seq_id, self._clock())
        jobs = []
        prompt_rows = PROMPT_ROWS
        for work in plan.work:
            seq = self._open.running[work.id]
            tokens = min(work.tokens, seq.length - seq.computed)  # more may have been found than was planned
            if seq.wants_prompt_logprobs:
                tokens = min(tokens, prompt_rows)
                prompt_rows -= tokens
            need = -(-(seq.computed + tokens) // self.info.page_tokens) - len(seq.pages)
            if tokens == 0 or need > self._pool.available:
                continue  # a preempted sequence shared its pages, so fewer came back: the next plan knows
            if need > 0:
                seq.hold(self._pool.allocate(need))
            jobs.append(Job.next_of(seq, tokens))
        return sorted(jobs, key=lambda job: job.tokens)

    # ---- the step

    def _launch(self, jobs: Seq[Job], before: LaunchedStep | None) -> list[LaunchedStep]:
        """Start the jobs as one step, as a rule. `before` is still under way.

        If that raises, the two halves are started, and so on until the job at fault is on its own.
        """
        jobs = [job for job in jobs if job.seq.id in self._open.running]  # another's fault may have ended it
        if not jobs:
            return []
        if len(jobs) == 1:
            with self._isolated(jobs[0].seq.request.id):
                return [self._launch_together(jobs, before)]
            return []
        try:
            return [self._launch_together(jobs, before)]
        except Exception as error:
            self._blame.not_ours(error, can_go_on=self._executor.can_go_on())
        half = len(jobs) // 2
        return [*self._launch(jobs[:half], before), *self._launch(jobs[half:], before)]

    def _launch_together(self, jobs: Seq[Job], before: LaunchedStep | None) -> LaunchedStep:
        """Start one step, and advance the books as if it were done."""
        step, learned = launch(
            self._executor,
            jobs,
            before,
            page_tokens=self.info.page_tokens,
            time=self._meter.time,
            now_s=self._clock(),
        )
        for job, logprobs in zip(jobs, learned, strict=True):
            job.seq.computed += job.tokens
            job.seq.prompt_logprobs += logprobs
            job.seq.in_flight += job.due
        self._meter.launched(step)
        return step

    def _complete(self, step: LaunchedStep) -> None:
        """Wait for a step, publish the blocks it completed, append its tokens."""
        samples = step.samples.collect() if step.samples else []
        self._meter.time.ended(Part.SAMPLE)
        self._meter.computed(step, self._clock())
        for job in step.jobs:
            drawn = samples[step.row_of[job.seq.id]] if job.due else None
            job.seq.in_flight -= job.due
            if job.seq in self._open:  # it may have ended while the step was under way
                with self._isolated(job.seq.request.id):
                    self._complete_job(job, drawn)
        self._meter.time.ended(Part.EMIT)

    def _complete_job(self, job: Job, drawn: Sampled | None) -> None:
        """Apply what a step has done for one sequence. `drawn`: None where nothing was due, or not finite."""
        seq = job.seq
        kept = seq.evictions == job.evictions
        if job.due and drawn is None:
            self._blocks.withdraw(seq, seq.pages if kept else [])
            self._meter.counts["nonfinite_outputs"] += 1
            self._open.fail(seq.request.id, Status.INTERNAL, _NOT_FINITE)
            return
        if kept:
            self._blocks.publish(list(seq.complete_blocks(job.end)))
        if drawn is not None:
            self._open.append(seq, drawn, self._clock())
            self._blame.token_came()

    @contextmanager
    def _isolated(self, request_id: RequestId) -> Iterator[None]:
        """Around all that is done for one request: an error inside ends this request and no other.

        Its pages go back. Blocks that it published are right: they were when their step was done.
        """
        try:
            yield
        except Exception as error:
            message = self._blame.request(error, can_go_on=self._executor.can_go_on())
            log.exception("request %s fails, and the engine goes on", request_id)
            self._open.remove(request_id)
            self._open.report_failed(Failure(request_id, Status.INTERNAL, message))


_NOT_FINITE = (
    "the model's logits are not finite; the weights or a shard's memory are damaged. "
    "Try again, and check the checkpoint if it happens again"
)
