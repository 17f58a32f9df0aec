"""The sequences of an engine: how they arrive, run, wait, grow and leave, and their events.

The scheduler decides which of them run, and the engine which of them an error ends.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer

from quire.kvstore.books.keys import KeySpace
from quire.replicas.engine.blocks import BlockStore
from quire.replicas.engine.meter import Meter
from quire.replicas.engine.sampler import Sampled
from quire.replicas.engine.scheduler import SeqId
from quire.replicas.engine.sequence import Progress, Sequence
from quire.replicas.errors import Status
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
from quire.replicas.text.detokenize import Detokenizer, special_tokens
from quire.replicas.text.stopping import StopRules


class OpenSequences:
    """The sequences of all open requests, and the pages that they hold."""

    def __init__(
        self, info: ModelInfo, keys: KeySpace, tokenizer: Tokenizer | None, blocks: BlockStore, meter: Meter
    ) -> None:
        self.waiting: dict[SeqId, Sequence] = {}
        self.running: dict[SeqId, Sequence] = {}
        self.events: list[Event] = []
        """What has happened since the engine last returned events."""
        self._info, self._keys, self._tokenizer = info, keys, tokenizer
        self._blocks, self._meter = blocks, meter
        self._special = special_tokens(tokenizer) if tokenizer else {}
        self.stop_rules = StopRules(info.eos_token_ids, self._special)
        self._next_id = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running.values()
        yield from self.waiting.values()

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self.running or seq.id in self.waiting

    # ---- arriving, running, waiting

    def open(self, request: Request, now_s: float) -> None:
        """Queue the first output of a valid request; the others follow once its prompt is computed."""
        sampling = resolved(request.sampling, self._info.sampling)
        end_tokens = self.stop_rules.end_tokens(sampling)
        self._enqueue(Progress.begin(request, sampling, end_tokens, now_s), 0, now_s)

    def admit(self, seq_id: SeqId, now_s: float) -> None:
        """Let a waiting sequence run, with the pages of its prefix that are in the pool."""
        seq = self.waiting.pop(seq_id)
        for other in self.waiting.values():
            other.overtaken += other.id < seq_id
        self.running[seq_id] = seq
        seq.hold(self._blocks.pool.share(seq.shareable_keys()))
        seq.computed = len(seq.pages) * seq.page_tokens
        seq.published = len(seq.pages)
        if seq.progress.admitted_s is None:
            seq.progress.admitted_s = now_s
            seq.progress.cached_tokens = seq.computed
            self._meter.admitted(seq)

    def preempt(self, seq_id: SeqId) -> None:
        """Take a running sequence's pages; it waits again."""
        seq = self.running.pop(seq_id)
        self._blocks.pool.release(seq.drop_pages())
        self.waiting[seq_id] = seq
        self._meter.counts["preemptions"] += 1

    def _enqueue(self, progress: Progress, index: int, now_s: float) -> None:
        request = progress.request
        detokenizer = None
        if self._tokenizer is not None:
            stop = request.sampling.stop
            detokenizer = Detokenizer(self._tokenizer, request.prompt, stop, self._special)
        seq_id = SeqId(self._next_id)
        self._next_id += 1
        self.waiting[seq_id] = seq = Sequence(
            id=seq_id,
            progress=progress,
            index=index,
            root=self._keys.root(request.tenant),
            page_tokens=self._info.page_tokens,
            detokenizer=detokenizer,
        )
        self._blocks.expect(seq, now_s)

    # ---- growing

    def append(self, seq: Sequence, drawn: Sampled, now_s: float) -> None:
        """Add a token to the sequence, and end the sequence if this was its last one."""
        progress = seq.progress
        first_of_request = progress.first_token_s is None
        if first_of_request:
            progress.first_token_s = now_s
            self._meter.first_token(progress, now_s)
            self._blocks.waits.computed(seq.id, now_s)
        seq.tokens.append(drawn.token)
        seq.output_counts[drawn.token] += 1
        progress.output_tokens += 1
        self._meter.counts["output_tokens"] += 1
        text, seq.finish_reason = seq.text_and_end(drawn.token, self._info.max_model_tokens)
        if seq.finish_reason is not None:
            self._leave(seq)
            self._meter.finished(progress, now_s)
            progress.open -= 1
        done = progress.open == 0
        self.events.append(
            Output(
                request_id=seq.request.id,
                index=seq.index,
                token_ids=(drawn.token,),
                text=text,
                logprobs=() if drawn.logprob is None else (drawn.logprob,),
                prompt_logprobs=tuple(seq.prompt_logprobs) if first_of_request else (),
                finish_reason=seq.finish_reason,
                usage=progress.usage() if done else None,
                timings=progress.timings(now_s) if done else None,
            )
        )
        if done:
            self._meter.counts["requests_finished"] += 1
        if first_of_request:  # the prompt's blocks are in the index now: the other outputs share them
            for index in range(1, seq.request.sampling.n):
                self._enqueue(progress, index, now_s)

    # ---- leaving

    def remove(self, request_id: RequestId) -> list[Sequence]:
        """Take all sequences of a request out and return them; none if there is no such request."""
        ours = [seq for seq in self if seq.request.id == request_id]
        for seq in ours:
            self._leave(seq)
        return ours

    def report_cancelled(self, removed: list[Sequence], now_s: float) -> None:
        """Tell that a request was cancelled, once for each output that was open, with its held-back text."""
        progress = removed[0].progress
        texts = {seq.index: seq.detokenizer.finish() if seq.detokenizer else "" for seq in removed}
        if progress.first_token_s is None:  # the other outputs have not begun
            texts |= dict.fromkeys(range(1, progress.request.sampling.n), "")
        for index, text in sorted(texts.items()):
            last = index == max(texts)
            self.events.append(
                Output(
                    request_id=progress.request.id,
                    index=index,
                    text=text,
                    finish_reason=FinishReason.CANCELLED,
                    usage=progress.usage() if last else None,
                    timings=progress.timings(now_s) if last else None,
                )
            )
        self._meter.counts["requests_cancelled"] += 1

    def report_failed(self, failure: Failure) -> None:
        """Tell that a request has failed."""
        self.events.append(failure)
        self._meter.counts["requests_failed"] += 1

    def fail(self, request_id: RequestId, status: Status, message: str, *, begun: bool = False) -> None:
        """Remove a request and tell that it has failed. Unknown ids are ignored."""
        if self.remove(request_id):
            self.report_failed(Failure(request_id, status, message, begun))

    def expire(self, now_s: float) -> None:
        """Fail the requests that never ran and whose deadline has passed."""
        for seq in list(self.waiting.values()):
            deadline = seq.request.deadline_s
            if deadline is not None and now_s > deadline and seq.progress.admitted_s is None:
                waited = now_s - seq.progress.submitted_s
                self.fail(
                    seq.request.id,
                    Status.DEADLINE_EXCEEDED,
                    f"the deadline passed after {waited:.2f} s in the queue; allow more time or add replicas",
                )

    def _leave(self, seq: Sequence) -> None:
        self.running.pop(seq.id, None)
        self.waiting.pop(seq.id, None)
        self._blocks.waits.forget(seq.id)
        self._blocks.pool.release(seq.drop_pages())
