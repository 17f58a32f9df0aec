"""The step loop's body: take requests in, plan, launch one step, hand the last one's events out.

Owns every sequence and the books of the page pool. Single-threaded; `async_engine.py` gives it a thread,
`llm.py` calls it directly. Tensors are the executor's.

Where the executor overlaps, a step is planned and launched while the one before computes: its tokens are
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
from quire.replicas.admission import check_request
from quire.replicas.config import SchedulerConfig
from quire.replicas.engine.blame import Blame
from quire.replicas.engine.blocks import BlockStore
from quire.replicas.engine.jobs import Job, LaunchedStep
from quire.replicas.engine.launch import StepExecutor, launch
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.engine.meter import Meter
from quire.replicas.engine.pressure import Pressure
from quire.replicas.engine.sampler import Sampled, needs_tokens
from quire.replicas.engine.scheduler import SchedulerState, SeqId, StepPlan, candidates, plan_step
from quire.replicas.engine.sequence import Progress, Sequence
from quire.replicas.engine.sharing import Alone, BlockSharing
from quire.replicas.engine.step_clock import Part
from quire.replicas.errors import QueueFull, Status
from quire.replicas.request import (
    Event,
    Failure,
    FinishReason,
    ModelInfo,
    Output,
    Request,
    RequestId,
    resolved,
)
from quire.replicas.stats import EngineStats
from quire.replicas.step_batch import PROMPT_ROWS
from quire.replicas.text.detokenize import Detokenizer, special_tokens
from quire.replicas.text.stopping import StopRules

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
        share: Callable[[PagePool], BlockSharing] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share`: makes this engine's part of the store; None for an engine alone."""
        self.info = info
        self._executor = executor
        self.keys = keys
        self._limits = scheduler
        self._max_step_tokens = max_step_tokens
        self._tokenizer = tokenizer
        self._clock = clock
        self._blocks = BlockStore(executor, share)
        self._pool, self._sharing = self._blocks.pool, self._blocks.sharing
        self._meter = Meter(
            self._blocks, max_running=scheduler.max_running, page_tokens=info.page_tokens, clock=clock
        )
        self._waiting: dict[SeqId, Sequence] = {}
        self._running: dict[SeqId, Sequence] = {}
        self._launched: LaunchedStep | None = None
        self.stalled = False
        """Whether the last step found nothing to compute: what waits, waits for pages or for news."""
        self._next_id = 0
        self._events: list[Event] = []
        self._blame = Blame()
        self._special = special_tokens(tokenizer) if tokenizer else {}
        self._stop_rules = StopRules(info.eos_token_ids, self._special)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything now: sequences that wait for news of their prefix do not."""
        waiting = any(not self._sharing.holds_back(seq_id) for seq_id in self._waiting)
        return bool(waiting or self._running or self._launched or self._events or self._sharing.has_news)

    @property
    def hopeless(self) -> Exception | None:
        """The last error, if one request after the other has failed and none had a token between them."""
        return None if self._launched else self._blame.hopeless  # what is under way may bring one

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def stats(self) -> EngineStats:
        return self._meter.stats(len(self._running), len(self._waiting))

    @property
    def load(self) -> LoadReport:
        """As of the end of the last step. From any thread."""
        return self._meter.load

    @property
    def pressure(self) -> Pressure:
        """As of a moment ago. From any thread."""
        return self._meter.pressure

    def check(self) -> None:
        """Hold the pool's books against the pages the sequences hold. Raises IntegrityError."""
        self._blocks.check(page for seq in self._sequences() for page in seq.pages)

    @property
    def sharing(self) -> BlockSharing | Alone:
        """Its part in the store: what other threads bring news to."""
        return self._sharing

    def validate(self, request: Request) -> None:
        """Refuse what can never be served. Raises InvalidRequest; touches nothing that changes."""
        check_request(
            request, self.info, pool_pages=self._pool.total, has_tokenizer=self._tokenizer is not None
        )
        self._stop_rules.check(request.sampling)

    def add(self, request: Request) -> None:
        """Queue a valid request. Raises InvalidRequest or QueueFull, and then nothing of it remains."""
        self._meter.taken()
        self.validate(request)
        if self.queued >= self._limits.max_queued:
            raise QueueFull(
                f"{self.queued} requests are waiting already, the bound is scheduler.max_queued="
                f"{self._limits.max_queued}; try again later or add replicas"
            )
        with self._alone(request.id):
            sampling = resolved(request.sampling, self.info.sampling)
            end_tokens = self._stop_rules.end_tokens(sampling)
            self._enqueue(Progress.begin(request, sampling, end_tokens, self._clock()), 0)

    def cancel(self, request_id: RequestId) -> None:
        """End a request; its pages are free before the next step. Unknown ids are ignored.

        Each output that was still open says so, with the text that was held back.
        """
        if ours := self._let_go(request_id):
            with self._alone(request_id):
                self._say_cancelled(ours)

    def _say_cancelled(self, ours: list[Sequence]) -> None:
        progress = ours[0].progress
        texts = {seq.index: seq.detokenizer.finish() if seq.detokenizer else "" for seq in ours}
        if progress.first_token_s is None:  # the other outputs have not begun
            texts |= dict.fromkeys(range(1, progress.request.sampling.n), "")
        for index, text in sorted(texts.items()):
            last = index == max(texts)
            self._events.append(
                Output(
                    request_id=progress.request.id,
                    index=index,
                    text=text,
                    finish_reason=FinishReason.CANCELLED,
                    usage=progress.usage() if last else None,
                    timings=progress.timings(self._clock()) if last else None,
                )
            )
        self._meter.counts["requests_cancelled"] += 1

    def fail_running(self, status: Status, message: str) -> None:
        """What is being computed ends with a Failure that says so."""
        for request_id in {seq.request.id for seq in self._running.values()}:
            self._fail(request_id, status, message, begun=True)

    def fail_all(self, status: Status, message: str) -> None:
        """Every open request ends with a Failure."""
        for request_id in {seq.request.id for seq in self._sequences()}:
            self._fail(request_id, status, message)

    def step(self) -> tuple[Event, ...]:
        """Launch one step, if there is anything to do, and return all events since the last call.

        What goes wrong with one request ends that request. Raises ReplicaDied, or whatever else ends the
        engine; the caller then decides about the open requests (`fail_running`, `fail_all`).
        """
        self._meter.time.start()
        self._expire()
        self._sharing.poll(
            self._clock(), self._meter.queued_tokens(self._running.values(), self._waiting.values())
        )
        self._meter.time.ended(Part.PLAN)
        before, self._launched = self._launched, None
        if before and any(map(needs_tokens, self._running.values())):
            self._absorb(before)
            before = None
        launched = self._launch(plan_step(self._state()), before)
        self.stalled = not (before or launched)
        if before:
            self._absorb(before)
        if len(launched) == 1 and self._executor.overlaps:
            self._launched = launched[0]
        else:
            for step in launched:
                self._absorb(step)
        self._meter.stepped(self._running.values(), self._waiting.values(), self._clock())
        return self.take_events()

    def take_events(self) -> tuple[Event, ...]:
        events, self._events = tuple(self._events), []
        return events

    # ---- before the step

    def _state(self) -> SchedulerState:
        """Blocks are looked up for those waiting sequences only that the step can reach."""
        ready = [seq for seq in self._waiting.values() if not self._sharing.holds_back(seq.id)]
        state = SchedulerState(
            running=[seq.as_running(self.info.max_model_tokens) for seq in self._running.values()],
            waiting=[seq.as_waiting(seq.found_blocks) for seq in ready],
            available_pages=self._pool.available,
            page_tokens=self.info.page_tokens,
            max_running=self._limits.max_running,
            max_step_tokens=self._max_step_tokens,
        )
        reached = [self._waiting[seq.id] for seq in candidates(state)[: self._limits.max_running]]
        return replace(state, waiting=[seq.as_waiting(*self._blocks.find(seq)) for seq in reached])

    def _carry_out(self, plan: StepPlan) -> list[Job]:
        """Move sequences and pages as planned. Cached blocks are taken before anything can evict them."""
        for seq_id in plan.preempt:
            seq = self._running.pop(seq_id)
            self._pool.release(seq.drop_pages())
            self._waiting[seq_id] = seq
        for seq_id in plan.admit:
            seq = self._waiting.pop(seq_id)
            for other in self._waiting.values():
                other.overtaken += other.id < seq_id
            self._running[seq_id] = seq
            seq.hold(self._pool.share(seq.shareable_keys()))
            seq.computed = len(seq.pages) * self.info.page_tokens
            seq.published = len(seq.pages)
            if seq.progress.admitted_s is None:
                seq.progress.admitted_s = self._clock()
                seq.progress.cached_tokens = seq.computed
                self._meter.admitted(seq)
        jobs = []
        prompt_rows = PROMPT_ROWS
        for work in plan.work:
            seq = self._running[work.id]
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
        self._meter.counts["preemptions"] += len(plan.preempt)
        return sorted(jobs, key=lambda job: job.tokens)

    # ---- the step

    def _launch(self, plan: StepPlan, before: LaunchedStep | None) -> list[LaunchedStep]:
        """Start the planned step, and advance the books as if it were done. `before` is still under way."""
        jobs = self._carry_out(plan)
        self._meter.time.ended(Part.PLAN)
        return self._start(jobs, before)

    def _start(self, jobs: Seq[Job], before: LaunchedStep | None) -> list[LaunchedStep]:
        """One step, as a rule. If it raises, its halves, and so on until the job at fault stands alone."""
        jobs = [job for job in jobs if job.seq.id in self._running]  # another one's fault may have ended it
        if not jobs:
            return []
        if len(jobs) == 1:
            with self._alone(jobs[0].seq.request.id):
                return [self._start_together(jobs, before)]
            return []
        try:
            return [self._start_together(jobs, before)]
        except Exception as error:
            self._blame.not_ours(error, can_go_on=self._executor.can_go_on())
        half = len(jobs) // 2
        return [*self._start(jobs[:half], before), *self._start(jobs[half:], before)]

    def _start_together(self, jobs: Seq[Job], before: LaunchedStep | None) -> LaunchedStep:
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

    def _absorb(self, step: LaunchedStep) -> None:
        """Wait for a step, publish the blocks it completed, append its tokens."""
        samples = step.samples.collect() if step.samples else []
        self._meter.time.ended(Part.SAMPLE)
        self._meter.computed(step, self._clock())
        for job in step.jobs:
            seq = job.seq
            drawn = samples[step.row_of[seq.id]] if job.due else None
            if job.due:
                seq.in_flight -= 1
            if seq.id not in self._running and seq.id not in self._waiting:
                continue  # ended while the step was under way
            with self._alone(seq.request.id):
                self._take_in(job, drawn)
        self._meter.time.ended(Part.EMIT)

    def _take_in(self, job: Job, drawn: Sampled | None) -> None:
        """What a step has done for one sequence. `drawn`: None where nothing was due, or no number came."""
        seq = job.seq
        kept = seq.evictions == job.evictions
        if job.due and drawn is None:
            self._blocks.withdraw(seq, seq.pages if kept else [])
            self._meter.counts["nonfinite_outputs"] += 1
            self._fail(seq.request.id, Status.INTERNAL, _NOT_FINITE)
            return
        if kept:
            self._blocks.publish(list(seq.complete_blocks(job.end)))
        if drawn is not None:
            self._append(seq, drawn)
            self._blame.token_came()

    def _append(self, seq: Sequence, drawn: Sampled) -> None:
        """The sequence grows by one token: say so, and end it if this was its last."""
        now, progress, params = self._clock(), seq.progress, seq.request.sampling
        first_of_request = progress.first_token_s is None
        if first_of_request:
            progress.first_token_s = now
            self._meter.first_token(progress, now)
            self._sharing.computed(seq.id, now)
        seq.tokens.append(drawn.token)
        seq.output_counts[drawn.token] += 1
        progress.output_tokens += 1
        self._meter.counts["output_tokens"] += 1
        text, seq.finish_reason = seq.text_and_end(drawn.token, self.info.max_model_tokens)
        if seq.finish_reason is not None:
            self._leave(seq)
            self._meter.finished(progress, now)
            progress.open -= 1
        done = progress.open == 0
        self._events.append(
            Output(
                request_id=seq.request.id,
                index=seq.index,
                token_ids=(drawn.token,),
                text=text,
                logprobs=() if drawn.logprob is None else (drawn.logprob,),
                prompt_logprobs=tuple(seq.prompt_logprobs) if first_of_request else (),
                finish_reason=seq.finish_reason,
                usage=progress.usage() if done else None,
                timings=progress.timings(now) if done else None,
            )
        )
        if done:
            self._meter.counts["requests_finished"] += 1
        if first_of_request:  # the prompt's blocks are in the index now: the other outputs share them
            for index in range(1, params.n):
                self._enqueue(progress, index)

    # ---- coming and going

    def _sequences(self) -> Iterator[Sequence]:
        yield from self._running.values()
        yield from self._waiting.values()

    def _enqueue(self, progress: Progress, index: int) -> None:
        request = progress.request
        detokenizer = None
        if self._tokenizer is not None:
            stop = request.sampling.stop
            detokenizer = Detokenizer(self._tokenizer, request.prompt, stop, self._special)
        seq_id = SeqId(self._next_id)
        self._next_id += 1
        self._waiting[seq_id] = seq = Sequence(
            id=seq_id,
            progress=progress,
            index=index,
            root=self.keys.root(request.tenant),
            page_tokens=self.info.page_tokens,
            detokenizer=detokenizer,
        )
        self._blocks.expect(seq, self._clock())

    def _leave(self, seq: Sequence) -> None:
        self._running.pop(seq.id, None)
        self._waiting.pop(seq.id, None)
        self._sharing.forget(seq.id)
        self._pool.release(seq.drop_pages())

    def _let_go(self, request_id: RequestId) -> list[Sequence]:
        """Take all sequences of a request out and return them; none if there is no such request."""
        ours = [seq for seq in self._sequences() if seq.request.id == request_id]
        for seq in ours:
            self._leave(seq)
        return ours

    def _fail(self, request_id: RequestId, status: Status, message: str, *, begun: bool = False) -> None:
        if self._let_go(request_id):
            self._say_failed(Failure(request_id, status, message, begun))

    @contextmanager
    def _alone(self, request_id: RequestId) -> Iterator[None]:
        """Around all that is done for one request: an error inside ends this request and nobody else.

        Its pages go back. Blocks that it published are right: they were when their step was done.
        """
        try:
            yield
        except Exception as error:
            message = self._blame.request(error, can_go_on=self._executor.can_go_on())
            log.exception("request %s fails, and the engine goes on", request_id)
            self._let_go(request_id)
            self._say_failed(Failure(request_id, Status.INTERNAL, message))

    def _say_failed(self, failure: Failure) -> None:
        self._events.append(failure)
        self._meter.counts["requests_failed"] += 1

    def _expire(self) -> None:
        """Requests that never ran and whose deadline is over need not run any more."""
        now = self._clock()
        for seq in list(self._waiting.values()):
            deadline = seq.request.deadline_s
            if deadline is not None and now > deadline and seq.progress.admitted_s is None:
                waited = now - seq.progress.submitted_s
                self._fail(
                    seq.request.id,
                    Status.DEADLINE_EXCEEDED,
                    f"the deadline passed after {waited:.2f} s in the queue; allow more time or add replicas",
                )


_NOT_FINITE = (
    "the model's logits are not finite; the weights or a shard's memory are damaged. "
    "Try again, and check the checkpoint if it happens again"
)
