"""The attempts of one request at several gateways: which gateway is next, how long to wait, and what is new.

Knows no channel: the client sends, and reports what came of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from quire.cluster.api.resume import Delivered, Differs
from quire.cluster.api.status import FINGERPRINT_METADATA, REPEATABLE_METADATA
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import DeadlinePassed, QuireError, ReplicaDied

_PAUSE_S = 0.25
"""The wait before all gateways are asked once more."""


class Attempts:
    """Where a request goes next while a gateway may still answer it. Only UNAVAILABLE is retried."""

    def __init__(
        self,
        gateways: int,
        first: int,
        *,
        retry_for_s: float,
        deadline_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask every gateway once, `first` before the others, and again for up to `retry_for_s` seconds.

        `deadline_s` is the time for all attempts together.
        """
        self.gateway = first
        """The gateway to ask now."""
        self._gateways, self._left = gateways, gateways
        self._clock = clock
        now_s = clock()
        self._retry_until_s = now_s + retry_for_s
        self._deadline_s = None if deadline_s is None else now_s + deadline_s
        self._repeatable = False
        self._delivered = Delivered()
        self._again = self._delivered.again()

    @property
    def timeout_s(self) -> float | None:
        """The timeout of the call to be made now. Raises DeadlinePassed."""
        if self._deadline_s is None:
            return None
        if (left_s := self._deadline_s - self._clock()) <= 0:
            raise DeadlinePassed("the deadline passed before a gateway answered; give a longer one")
        return left_s

    def began(self, metadata: Mapping[str, str | bytes]) -> None:
        """Take the initial metadata of an answer. Raises Differs if it cannot resume the answer before it."""
        self._delivered.from_model(str(metadata.get(FINGERPRINT_METADATA, "")))
        self._repeatable = metadata.get(REPEATABLE_METADATA) == "1"
        self._again = self._delivered.again()

    def rest(self, delta: inference_pb2.Delta) -> inference_pb2.Delta | None:
        """Return what is new in a delta, or None. Raises Differs."""
        if (rest := self._again.rest(delta)) is not None:
            self._delivered.add(rest)
        return rest

    def failed(self, error: QuireError) -> float:
        """Return the seconds to wait before the next attempt. Raises the error if no attempt could help."""
        if not isinstance(error, ReplicaDied) or isinstance(error, Differs):
            raise error
        if self._delivered and not self._repeatable:
            raise error
        self.gateway = (self.gateway + 1) % self._gateways
        self._left -= 1
        if self._left > 0:
            return 0.0
        if self._clock() + _PAUSE_S > self._retry_until_s:
            raise error
        self._left = self._gateways
        return _PAUSE_S
