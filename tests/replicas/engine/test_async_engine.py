"""The engine's thread: every request ends with one last event, whatever happens."""

import contextlib
import os
import queue
import re
import signal

import pytest
from recall import mixed_prompts

from quire.replicas.config import EngineConfig, SchedulerConfig
from quire.replicas.engine.async_engine import AsyncEngine
from quire.replicas.engine.load import load_tokenizer
from quire.replicas.errors import InvalidRequest, QueueFull, ReplicaDied, Status
from quire.replicas.request import Event, Failure, FinishReason, Request, RequestId, SamplingParams
from quire.replicas.text.detokenize import Detokenizer

PROMPT = tuple(mixed_prompts(load_tokenizer("demo"), [90])[0])


def _request(name: str, max_tokens: int = 10) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(id=RequestId(name), prompt=PROMPT, sampling=sampling)


def _is_last(event: Event) -> bool:
    return isinstance(event, Failure) or event.usage is not None


class _Events:
    """Collects what the engine delivers."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[tuple[Event, ...]] = queue.SimpleQueue()

    def deliver(self, events: tuple[Event, ...]) -> None:
        self._steps.put(events)

    def until_last(self, count: int) -> dict[str, list[Event]]:
        """All events until `count` requests have had their last one."""
        found: dict[str, list[Event]] = {}
        while count:
            for event in self._steps.get(timeout=60):
                found.setdefault(event.request_id, []).append(event)
                count -= _is_last(event)
        return found


@pytest.fixture
def events():
    return _Events()


@pytest.fixture
def start(events):
    """Starts engines and closes them."""
    engines = []

    def start(tp: int = 1, **scheduler: int) -> AsyncEngine:
        config = EngineConfig(
            model="demo",
            kv="int8",
            tp=tp,
            threads_per_shard=1,
            scheduler=SchedulerConfig(**scheduler),
        )
        engines.append(AsyncEngine(config))
        engines[-1].start(events.deliver)
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def test_requests_from_another_thread_are_answered(start, events):
    engine = start()
    for name in "abc":
        engine.submit(_request(name))
    found = events.until_last(3)
    assert {len(outputs) for outputs in found.values()} == {10}
    engine.check_health()


def test_the_books_can_be_checked_while_requests_run(start, events):
    engine = start()
    engine.submit(_request("a", 60))
    for _ in range(20):
        engine.check()
    events.until_last(1)
    engine.check()


def test_bad_requests_are_refused_where_they_are_submitted(start):
    engine = start()
    with pytest.raises(InvalidRequest):
        engine.submit(Request(id=RequestId("x"), prompt=()))


def test_the_queue_bound_counts_what_the_engine_has_not_seen_yet(start, events):
    engine = start(max_queued=3, max_running=1)
    accepted, refused = 0, []
    for i in range(30):
        try:
            engine.submit(_request(str(i), 5))
            accepted += 1
        except QueueFull as error:
            refused.append(str(error))
    assert refused
    assert all("scheduler.max_queued=3" in message for message in refused)
    assert len(events.until_last(accepted)) == accepted


def test_requests_accepted_before_the_queue_grew_get_their_last_event(start, events):
    """Outputs 1.. of a request join the queue after others were accepted."""
    engine = start(max_queued=4, max_running=1)
    many = SamplingParams(max_tokens=3, ignore_eos=True, n=8)
    engine.submit(Request(id=RequestId("many"), prompt=PROMPT, sampling=many))
    accepted = ["many"]
    for i in range(40):
        with contextlib.suppress(QueueFull):
            engine.submit(_request(str(i), 2))
            accepted.append(str(i))
    found = events.until_last(len(accepted))
    assert all(_is_last(outputs[-1]) for outputs in found.values())
    assert set(found) == set(accepted)
    engine.check_health()


def test_cancelling_ends_a_request_with_what_it_had(start, events):
    engine = start()
    engine.submit(_request("a", 2000))
    engine.cancel(RequestId("a"))
    (*_, last) = events.until_last(1)["a"]
    assert last.finish_reason is FinishReason.CANCELLED
    engine.submit(_request("b"))
    events.until_last(1)
    assert engine.stats().pages_used == 0


def test_closing_fails_what_is_open(start, events):
    engine = start()
    engine.submit(_request("a", 3000))
    engine.close()
    (*_, last) = events.until_last(1)["a"]
    assert last.status is Status.UNAVAILABLE
    with pytest.raises(ReplicaDied, match="shutting down"):
        engine.submit(_request("b"))


def test_a_dead_shard_fails_all_requests_and_the_health_check(start, events):
    engine = start(tp=2)
    for name in "abcd":
        engine.submit(_request(name, 3000))
    (child,) = engine._executor._launcher._children.values()
    os.kill(child.pid, signal.SIGKILL)
    found = events.until_last(4)
    assert {(outputs[-1].status, outputs[-1].begun) for outputs in found.values()} == {
        (Status.UNAVAILABLE, True)
    }
    # Whichever is noticed first: the process is gone, or its connections are.
    says = re.compile("was killed by signal 9|lost another one")
    assert all(says.search(outputs[-1].message) for outputs in found.values())
    with pytest.raises(ReplicaDied):
        engine.check_health()
    with pytest.raises(ReplicaDied):
        engine.submit(_request("e"))


class Broken:
    """An executor whose tenth step raises, after which it computes no other."""

    def __init__(self, executor):
        self._executor, self._steps = executor, 0

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def run(self, batch, drawn=None):
        self._steps += 1
        if self._steps >= 10:
            raise RuntimeError("an illegal memory access")
        return self._executor.run(batch, drawn)

    def can_go_on(self):
        return self._steps < 10


def test_an_engine_that_fails_whatever_comes_ends(events, monkeypatch):
    """It would look idle, and draw all requests to itself."""

    def push(self, token, *, may_stop=True):
        raise ValueError("no such thing")

    monkeypatch.setattr(Detokenizer, "push", push)
    engine = AsyncEngine(EngineConfig(model="demo", threads_per_shard=1))
    for at in range(12):
        engine.submit(_request(str(at), 3))
    engine.start(events.deliver)
    events.until_last(12)
    engine._thread.join()
    with pytest.raises(ReplicaDied, match="ValueError"):
        engine.check_health()
    engine.close()


def test_what_an_engine_computed_when_it_failed_is_for_nobody_else_and_what_waited_is(events):
    scheduler = SchedulerConfig(max_running=1)
    engine = AsyncEngine(EngineConfig(model="demo", threads_per_shard=1, scheduler=scheduler))
    engine._engine._executor = Broken(engine._executor)
    engine.submit(_request("computed", 3000))
    engine.submit(_request("waits", 3000))
    engine.start(events.deliver)
    found = events.until_last(2)
    failures = {name: outputs[-1] for name, outputs in found.items()}
    assert (failures["computed"].status, failures["computed"].begun) == (Status.INTERNAL, True)
    assert "RuntimeError: an illegal memory access" in failures["computed"].message
    assert (failures["waits"].status, failures["waits"].begun) == (Status.UNAVAILABLE, False)
    with pytest.raises(ReplicaDied, match="RuntimeError"):
        engine.check_health()
    engine.close()
