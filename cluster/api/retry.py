"""One request's tries at several gateways, as both clients make them: where next, how long, what is new.

Knows no channel: the clients send, and tell what came of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from quire.cluster.api.resume import Delivered, Differs
from quire.cluster.api.status import FINGERPRINT_METADATA, REPEATABLE_METADATA
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import DeadlinePassed, QuireError, ReplicaDied

_PAUSE_S = 0.25
"""Before all gateways are tried once more."""


class Tries:
    """While somebody may still answer. Only UNAVAILABLE is tried again."""

    def __init__(
        self,
        gateways: int,
        first: int,
        *,
        patience_s: float,
        deadline_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Every gateway is asked once, `first` before the others; and again while `patience_s` lasts.

        `deadline_s`: seconds for all tries together.
        """
        self.gateway = first
        """To be asked now."""
        self._gateways, self._left = gateways, gateways
        self._clock = clock
        now_s = clock()
        self._patient_until_s = now_s + patience_s
        self._over_s = None if deadline_s is None else now_s + deadline_s
        self._repeatable = False
        self._delivered = Delivered()
        self._again = self._delivered.again()

    @property
    def timeout_s(self) -> float | None:
        """For the call to be made now. Raises DeadlinePassed."""
        if self._over_s is None:
            return None
        if (left_s := self._over_s - self._clock()) <= 0:
            raise DeadlinePassed("the deadline passed before anybody answered; give a longer one")
        return left_s

    def began(self, metadata: Mapping[str, str | bytes]) -> None:
        """The answer's initial metadata. Raises Differs if it cannot go on where the last one stopped."""
        self._delivered.from_model(str(metadata.get(FINGERPRINT_METADATA, "")))
        self._repeatable = metadata.get(REPEATABLE_METADATA) == "1"
        self._again = self._delivered.again()

    def rest(self, delta: inference_pb2.Delta) -> inference_pb2.Delta | None:
        """What is new of it. Raises Differs."""
        if (rest := self._again.rest(delta)) is not None:
            self._delivered.add(rest)
        return rest

    def failed(self, error: QuireError) -> float:
        """Seconds to wait before the next try. Raises the error if there is none that could help."""
        if not isinstance(error, ReplicaDied) or isinstance(error, Differs):
            raise error
        if self._delivered and not self._repeatable:
            raise error
        self.gateway = (self.gateway + 1) % self._gateways
        self._left -= 1
        if self._left > 0:
            return 0.0
        if self._clock() + _PAUSE_S > self._patient_until_s:
            raise error
        self._left = self._gateways
        return _PAUSE_S
