"""What a gateway's clients see: how calls end, and how long they wait. Knows no Ray.

A call costs a few additions for each of its messages; its totals are handed on once, at its end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from quire.cluster.metrics import catalogue as c
from quire.cluster.routing.replica_table import RoutingNumbers
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.metric import series

Send = Callable[[inference_pb2.Delta], Awaitable[None]]
OK = "OK"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A request that ended well."""

    first_token_s: float = series(c.FIRST_TOKEN)
    inter_token_s: float | None = series(c.INTER_TOKEN)
    """None: no output has two tokens."""
    longest_pause_s: float | None = series(c.LONGEST_PAUSE)
    """None: there was one message with tokens."""
    total_s: float = series(c.END_TO_END)
    queue_s: float = series(c.QUEUE)
    prompt_tokens: int = series(c.PROMPT_SIZE)
    output_tokens: int = series(c.OUTPUT_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayNumbers:
    """What a gateway counts."""

    open_requests: int = series(c.GATEWAY_OPEN)
    max_open_requests: int = series(c.GATEWAY_LIMIT)
    retries: int = series(c.RETRIES)
    replicas: int = series(c.GATEWAY_REPLICAS)
    outcomes: Mapping[tuple[str, str], int]
    """Calls that ended, by RPC and gRPC status."""
    routing: RoutingNumbers


class Watch:
    """One call, from its arrival on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._arrived_s = clock()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._pause_s = 0.0
        self._messages = 0
        self._outputs = 0
        self._usage: inference_pb2.Usage | None = None
        self._queue_s = 0.0
        self.status = OK

    def watched(self, send: Send) -> Send:
        """A `send` that is watched from here."""

        async def send_watched(delta: inference_pb2.Delta) -> None:
            if delta.token_ids:
                self._saw_tokens(delta)
            if delta.HasField("usage"):
                self._usage, self._queue_s = delta.usage, delta.timings.queue_s
            await send(delta)

        return send_watched

    def answered(self) -> Answered | None:
        """None unless the call was a request and ended well, with a token at least."""
        if self.status != OK or self._usage is None or self._first_s is None:
            return None
        steps = self._usage.output_tokens / self._outputs - 1
        return Answered(
            first_token_s=self._first_s - self._arrived_s,
            inter_token_s=(self._last_s - self._first_s) / steps if steps > 0 else None,
            longest_pause_s=self._pause_s if self._messages > 1 else None,
            total_s=self._clock() - self._arrived_s,
            queue_s=self._queue_s,
            prompt_tokens=self._usage.prompt_tokens,
            output_tokens=self._usage.output_tokens,
        )

    def _saw_tokens(self, delta: inference_pb2.Delta) -> None:
        now = self._clock()
        if self._first_s is None:
            self._first_s = now
        else:
            self._pause_s = max(self._pause_s, now - self._last_s)
        self._last_s = now
        self._messages += 1
        self._outputs = max(self._outputs, delta.index + 1)


class Meter:
    """All calls of one gateway. Used on its event loop; `outcomes` may be read anywhere."""

    def __init__(
        self,
        on_answered: Callable[[Answered], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Calls that ended, by RPC and gRPC status."""
        self._on_answered = on_answered
        self._clock = clock

    @contextmanager
    def call(self, method: str) -> Iterator[Watch]:
        """A call of the RPC `method`; the handler sets the watch's `status`."""
        watch = Watch(self._clock)
        try:
            yield watch
        finally:
            self.outcomes[method, watch.status] += 1
            if (answered := watch.answered()) is not None:
                self._on_answered(answered)
