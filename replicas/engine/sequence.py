"""One output of one request while it is generated: its tokens, pages, keys and text.

Mutable, and owned by the engine alone.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from quire.kvstore.books.keys import BlockKey, extend_chain
from quire.kvstore.books.prefix_index import PageId
from quire.replicas.engine.scheduler import MAX_OVERTAKEN, Running, SeqId, Waiting
from quire.replicas.request import (
    FinishReason,
    Request,
    ResolvedSampling,
    Timings,
    TokenLogprob,
    Usage,
)
from quire.replicas.step_batch import Ints
from quire.replicas.text.detokenize import Detokenizer


@dataclass(eq=False, slots=True)
class Progress:
    """The state that the outputs of one request share."""

    request: Request
    sampling: ResolvedSampling
    """The request's sampling parameters, with the model's defaults filled in."""
    end_tokens: frozenset[int]
    """Tokens that end an output that has min_tokens."""
    submitted_s: float
    seed: int
    open: int
    """Number of outputs that are not finished."""
    admitted_s: float | None = None
    first_token_s: float | None = None
    cached_tokens: int = 0
    output_tokens: int = 0

    @staticmethod
    def begin(
        request: Request, sampling: ResolvedSampling, end_tokens: frozenset[int], now_s: float
    ) -> Progress:
        """Start a request."""
        seed = request.sampling.seed
        return Progress(
            request=request,
            sampling=sampling,
            end_tokens=end_tokens,
            submitted_s=now_s,
            seed=secrets.randbits(63) if seed is None else seed,
            open=request.sampling.n,
        )

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
        )

    def timings(self, now_s: float) -> Timings:
        """Return the request's timings; moments that never came count as now."""
        admitted_s = now_s if self.admitted_s is None else self.admitted_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return Timings(
            queue_s=admitted_s - self.submitted_s,
            first_token_s=first_token_s - self.submitted_s,
            total_s=now_s - self.submitted_s,
        )


@dataclass(eq=False, slots=True)
class Sequence:
    """One output. Tokens are only appended; pages hold the KV of the first `computed` of them.

    With a step in flight, `computed` may run ahead of the tokens known here.
    """

    id: SeqId
    progress: Progress
    index: int
    root: BlockKey
    page_tokens: int
    detokenizer: Detokenizer | None
    tokens: list[int] = field(init=False)
    in_flight: int = 0
    """Number of later tokens, drawn by steps whose results are not known yet."""
    computed: int = 0
    """Number of tokens whose KV is in pages once all launched steps are done."""
    pages: list[PageId] = field(default_factory=list)
    published: int = 0
    """Number of leading blocks that are in the prefix index."""
    brought_back: bool = False
    """Whether its prefix was looked up in host memory since it last lost its pages."""
    found_blocks: int = 0
    """Number of leading blocks that were in the pool at the last lookup."""
    fetched_blocks: int = 0
    """Number of leading blocks that another replica sent while it waited."""
    promoted_blocks: int = 0
    """Number of leading blocks that came back from host memory at the last lookup."""
    overtaken: int = 0
    """Number of later arrivals that were admitted while it waited."""
    evictions: int = 0
    """How often it lost its pages; results of steps launched before that are dropped."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)
    finish_reason: FinishReason | None = None
    _keys: list[BlockKey] = field(default_factory=list)
    _page_row: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self._page_row = np.zeros(8, dtype=np.int64)

    @property
    def request(self) -> Request:
        return self.progress.request

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def length(self) -> int:
        """Count its tokens, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def overdue(self) -> bool:
        return self.overtaken >= MAX_OVERTAKEN

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Tell whether it must report prompt log-probabilities: only the first output does, once."""
        return (
            self.request.sampling.prompt_logprobs is not None
            and self.index == 0
            and len(self.prompt_logprobs) < self.prompt_tokens - 1
        )

    def keys(self) -> list[BlockKey]:
        """Return the keys of all full blocks of the known tokens."""
        parent = self._keys[-1] if self._keys else self.root
        self._keys += extend_chain(
            parent, self.tokens[len(self._keys) * self.page_tokens :], self.page_tokens
        )
        return self._keys

    def shareable_keys(self) -> list[BlockKey]:
        """Return the keys to look up: at least one token must be left to compute, or there are no logits."""
        if self.wants_prompt_logprobs:
            return []
        return self.keys()[: (len(self.tokens) - 1) // self.page_tokens]

    def hits(self) -> dict[str, int]:
        """Count the tokens that are cached as it is admitted, by where their blocks were."""
        remote = min(self.fetched_blocks, len(self.pages))
        host = min(self.promoted_blocks, len(self.pages) - remote)
        blocks = {"local": len(self.pages) - remote - host, "host": host, "remote": remote}
        return {f"{source}_tokens": count * self.page_tokens for source, count in blocks.items()}

    def complete_blocks(self, computed: int) -> Iterator[tuple[BlockKey, PageId]]:
        """Return the blocks that are complete with `computed` tokens and were not returned before."""
        full = computed // self.page_tokens
        if full > self.published:
            keys = self.keys()
            for block in range(self.published, full):
                yield keys[block], self.pages[block]
            self.published = full

    def text_and_end(self, token: int, max_model_tokens: int) -> tuple[str, FinishReason | None]:
        """Return the text that the appended token adds, and whether the output ends with it."""
        params, text = self.request.sampling, ""
        may_stop = self.output_tokens >= params.min_tokens
        if may_stop and token in self.progress.end_tokens:
            return (self.detokenizer.finish() if self.detokenizer else ""), FinishReason.STOP
        if self.detokenizer:
            text, stopped = self.detokenizer.push(token, may_stop=may_stop)
            if stopped:
                return text, FinishReason.STOP
        full = self.output_tokens >= params.max_tokens or len(self.tokens) >= max_model_tokens
        if not full:
            return text, None
        return text + (self.detokenizer.finish() if self.detokenizer else ""), FinishReason.LENGTH

    def hold(self, pages: list[PageId]) -> None:
        """Append pages, in token order."""
        have, want = len(self.pages), len(self.pages) + len(pages)
        if want > self._page_row.size:
            self._page_row = np.concatenate([self._page_row, np.zeros(want, dtype=np.int64)])
        self._page_row[have:want] = pages
        self.pages += pages

    def drop_pages(self) -> list[PageId]:
        """Release all pages: their KV will be recomputed, or found in the prefix index."""
        pages, self.pages = self.pages, []
        self.computed = self.published = 0
        self.evictions += 1
        self.brought_back = False
        return pages

    def page_row(self) -> Ints:
        return self._page_row[: len(self.pages)]

    def as_running(self, max_model_tokens: int) -> Running:
        """Return it for the scheduler; with its last token in flight, nothing is left to compute."""
        limit = min(self.prompt_tokens + self.request.sampling.max_tokens, max_model_tokens)
        known = self.length if self.length < limit else self.computed
        pages = len(self.pages)
        return Running(self.id, self.request.priority, known, self.computed, pages, self.overdue)

    def as_waiting(self, cached_pages: int, idle_pages: int = 0) -> Waiting:
        """Return it for the scheduler, with its leading blocks in the pool and the unused ones of them."""
        priority = self.request.priority
        return Waiting(self.id, priority, self.length, cached_pages, idle_pages, self.overdue)
