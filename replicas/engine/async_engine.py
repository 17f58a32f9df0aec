"""An engine with a thread of its own: submit and cancel from anywhere, events once per step.

Every submitted request ends with exactly one last event, also when a shard dies under it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from quire.kvstore.books.keys import KeySpace
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import Message
from quire.kvstore.peers.network import PeerNetwork
from quire.replicas.config import EngineConfig
from quire.replicas.engine.engine import Engine
from quire.replicas.engine.load import load_engine
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.engine.pressure import Pressure
from quire.replicas.errors import QueueFull, QuireError, ReplicaDied, Status
from quire.replicas.request import Event, Failure, ModelInfo, Request, RequestId
from quire.replicas.runner.executor import Executor, ShardLauncher
from quire.replicas.runner.shard_process import use_threads
from quire.replicas.stats import EngineStats

_IDLE_WAKE_S = 0.2
"""How often an idle engine checks the deadlines of its queue and its shards."""

_STALLED_WAKE_S = 0.01
"""After how long a stalled engine tries again."""

_POLL_S = 0.02
"""How often a hand-over checks whether it is done."""

log = logging.getLogger(__name__)


class AsyncEngine:
    """An engine that loads at construction (blocking) and steps from `start` to `close`."""

    def __init__(
        self,
        config: EngineConfig,
        launcher: ShardLauncher | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        host: str = "127.0.0.1",
        network: PeerNetwork | None = None,
    ) -> None:
        """`host`: the address at which other shards and replicas reach this process.

        `network`: the way to the replicas that this one shares blocks with. Raises as `load_engine`.
        """
        self._arrived = threading.Condition()
        self._executor: Executor
        self._engine: Engine
        self._executor, self._engine = load_engine(
            config, launcher, progress, host=host, network=network, wake=self._wake
        )
        self._config = config
        self._inbox: deque[Request | RequestId] = deque()
        self._late: list[Event] = []
        self._stepping = threading.Lock()
        self._closing = False
        self._death: ReplicaDied | None = None
        self._verdict: tuple[Status, str] | None = None
        """Status and message for the requests that were being computed when the engine died."""
        self._thread: threading.Thread | None = None

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def keys(self) -> KeySpace:
        """What the keys of its blocks begin with."""
        return self._engine.keys

    @property
    def load(self) -> LoadReport:
        """The load at the end of the last step."""
        return self._engine.load

    def start(self, deliver: Callable[[tuple[Event, ...]], None]) -> None:
        """Begin stepping. `deliver` is called on the engine's thread with each step's events."""
        self._thread = threading.Thread(target=self._run, args=(deliver,), name="quire-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, QueueFull or ReplicaDied, and then no event follows."""
        self._engine.validate(request)
        with self._arrived:
            if self._death or self._closing:
                raise self._death or ReplicaDied("the replica is shutting down; try again")
            waiting = self._engine.queued + sum(isinstance(m, Request) for m in self._inbox)
            if waiting >= self._config.scheduler.max_queued:
                raise QueueFull(
                    f"{waiting} requests are waiting already, the bound is scheduler.max_queued="
                    f"{self._config.scheduler.max_queued}; try again later or add replicas"
                )
            self._inbox.append(request)
            self._arrived.notify()

    def cancel(self, request_id: RequestId) -> None:
        """End a request before the next step begins. Unknown ids are ignored."""
        with self._arrived:
            self._inbox.append(request_id)
            self._arrived.notify()

    def on_peer_message(self, sender: ReplicaId, message: Message) -> None:
        """Take another replica's message about blocks. Raises ReplicaDied once the engine has stopped."""
        if self._death or self._closing:
            raise self._death or ReplicaDied("the replica is shutting down")
        self._engine.peer.on_message(sender, message)

    def hand_over(self, peers: Sequence[ReplicaId], within_s: float) -> None:
        """Offer the hottest blocks to these replicas, until they have what they want or time is up."""
        if not peers or self._death:
            return
        deadline = time.monotonic() + within_s
        self._engine.peer.drain(peers)
        while self._engine.peer.is_draining and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def pressure(self) -> Pressure:
        """The figures that autoscaling uses. From any thread."""
        return self._engine.pressure

    def check(self) -> None:
        """Between two steps, compare the pool's books with what requests hold. Raises IntegrityError."""
        with self._stepping:
            self._engine.check()

    def check_health(self) -> None:
        """Raise ReplicaDied once a shard is gone or silent."""
        if self._death:
            raise self._death
        self._executor.check()

    @property
    def healthy(self) -> bool:
        """Whether `check_health` would not raise."""
        try:
            self.check_health()
        except ReplicaDied:
            return False
        return True

    def close(self) -> None:
        """Fail all open requests, stop the thread and the shards."""
        with self._arrived:
            self._closing = True
            self._arrived.notify()
        if self._thread:
            self._thread.join()
        self._executor.close()

    def _wake(self) -> None:
        with self._arrived:
            self._arrived.notify()

    def _run(self, deliver: Callable[[tuple[Event, ...]], None]) -> None:
        use_threads(self._config)
        while not self._closing:
            self._wait_for_work()
            try:
                with self._stepping:
                    self._take_inbox()
                    events = self._take_late() + self._engine.step()
                if events:
                    deliver(events)
                elif self._engine.stalled:
                    self._rest()
                self._executor.check()
                if self._engine.hopeless:  # a replica that fails whatever comes would draw all requests
                    raise self._engine.hopeless
            except Exception as error:  # the thread's outermost frame: whatever it was, no client may hang
                self._die(error)
                break
        if self._verdict:
            self._engine.fail_running(*self._verdict)
        self._engine.fail_all(Status.UNAVAILABLE, self._last_words())
        self._take_inbox()
        deliver(self._take_late() + self._engine.take_events())

    def _wait_for_work(self) -> None:
        with self._arrived:
            if not (self._inbox or self._engine.has_work or self._closing):
                deadline_s = self._engine.waits.next_deadline_s
                left_s = _IDLE_WAKE_S if deadline_s is None else deadline_s - time.monotonic()
                self._arrived.wait(min(max(left_s, _STALLED_WAKE_S), _IDLE_WAKE_S))

    def _rest(self) -> None:
        """Wait a little, or until woken: sequences wait for pages that others read or fill."""
        with self._arrived:
            if not (self._inbox or self._engine.waits.has_news or self._closing):
                self._arrived.wait(_STALLED_WAKE_S)

    def _take_inbox(self) -> None:
        """Hand submissions and cancellations to the engine, one by one; requests that came too late fail."""
        while True:
            with self._arrived:
                if not self._inbox:
                    return
                message = self._inbox.popleft()
            if isinstance(message, str):
                self._engine.cancel(message)
            elif self._death or self._closing:
                self._late.append(Failure(message.id, Status.UNAVAILABLE, self._last_words()))
            else:
                try:
                    self._engine.add(message)
                except Exception as error:
                    self._late.append(Failure(message.id, Status.INTERNAL, _failed(error), begun=True))
                    raise

    def _take_late(self) -> tuple[Event, ...]:
        late, self._late = tuple(self._late), []
        return late

    def _die(self, error: Exception) -> None:
        """Note why the engine stops. A lost shard is no request's fault. Any other error may be the fault of
        one, which must not go on to end the next engine."""
        log.error("the engine stops: %s", error, exc_info=not isinstance(error, QuireError))
        lost = isinstance(error, ReplicaDied)
        self._verdict = (Status.UNAVAILABLE, str(error)) if lost else (Status.INTERNAL, _failed(error))
        said = str(error) if lost else f"the engine failed ({type(error).__name__}); its log says where"
        with self._arrived:
            self._death = ReplicaDied(said)

    def _last_words(self) -> str:
        return str(self._death) if self._death else "the replica is shutting down; try again"


def _failed(error: Exception) -> str:
    return (
        f"the engine failed while it computed this request ({type(error).__name__}: {error}); the fault may "
        "be in the request, so no other replica was asked"
    )
