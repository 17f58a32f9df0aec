"""A fault of one request ends that request, in whatever part of a step it shows."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from overlapping import Overlapping
from recall import mixed_prompts

from quire.kvstore.books.pool import IntegrityError
from quire.replicas.config import EngineConfig, PoolConfig, SchedulerConfig
from quire.replicas.engine.engine import Engine
from quire.replicas.engine.load import load_engine, load_tokenizer
from quire.replicas.errors import ReplicaDied, Status
from quire.replicas.request import Event, Failure, Request, RequestId, SamplingParams
from quire.replicas.runner.executor import Executor
from quire.replicas.text.detokenize import Detokenizer

TOKENIZER = load_tokenizer("demo")
PROMPTS = [tuple(p) for p in mixed_prompts(TOKENIZER, [90, 130, 20, 64, 70])]
MARK = 4095
"""A token that only the request at fault has in its prompt."""
OUTSIDE = 5000
"""A token id that the vocabulary does not have."""


class Faulty:
    """An executor that raises for every step in which the marked token is computed."""

    def __init__(self, executor: Executor | Overlapping, error: Exception, *, lasting: bool = False) -> None:
        self._executor, self._error, self._lasting = executor, error, lasting
        self._broken = False
        self.steps = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._executor, name)

    def run(self, batch, drawn=None):
        self.steps += 1
        self._executor.run(batch, drawn)  # what was written is written again
        if MARK in batch.token_ids_T:
            self._broken = self._lasting
            raise self._error
        return self._executor.run(batch, drawn)

    def can_go_on(self) -> bool:
        return not self._broken


@pytest.fixture(params=["in turn", "overlapped"])
def make_engine(request) -> Callable[..., Engine]:
    def make(*, end_tokens: tuple[int, ...] = (2,), wrap=lambda executor: executor, **scheduler) -> Engine:
        config = EngineConfig(
            model="demo",
            kv="bf16",
            threads_per_shard=1,
            pool=PoolConfig(bytes=40 * 196608),
            scheduler=SchedulerConfig(**scheduler),
        )
        executor, engine = load_engine(config)
        if request.param == "overlapped":
            executor = Overlapping(executor)
        return Engine(
            executor=wrap(executor),
            info=replace(engine.info, eos_token_ids=end_tokens),
            keys=engine.keys,
            scheduler=config.scheduler,
            max_step_tokens=512,
            tokenizer=TOKENIZER.backend_tokenizer,
        )

    return make


def ask(engine: Engine, name: str, prompt: tuple[int, ...], **sampling) -> None:
    params = SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | sampling))
    engine.add(Request(id=RequestId(name), prompt=prompt, sampling=params))


def run(engine: Engine) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event)
    engine.check()
    assert engine.stats().pages_used == 0
    return found


def answers(found: dict[str, list[Event]]) -> dict[str, tuple[list[int], str]]:
    return {
        name: ([t for e in events for t in e.token_ids], "".join(e.text for e in events))
        for name, events in found.items()
    }


def with_company(engine: Engine, **culprit) -> tuple[dict[str, list[Event]], list[Event]]:
    """Four requests, and the one at fault, which comes while the first two decode: their events, and its."""
    prompt = culprit.pop("prompt", PROMPTS[4])
    for name, at in (("a", 0), ("b", 1)):
        ask(engine, name, PROMPTS[at])
    early = [event for _ in range(3) for event in engine.step()]
    ask(engine, "bad", prompt, **culprit)
    ask(engine, "c", PROMPTS[2], temperature=0.8, seed=4)
    ask(engine, "d", PROMPTS[3], prompt_logprobs=1)
    found = run(engine)
    for event in reversed(early):
        found[event.request_id].insert(0, event)
    bad = found.pop("bad")
    return found, bad


def assert_only_the_culprit_fails(
    make_engine, says: str, *, wrap=lambda executor: executor, **culprit
) -> None:
    engine = make_engine(wrap=wrap, end_tokens=culprit.pop("end_tokens", (2,)))
    found, bad = with_company(engine, **culprit)
    assert isinstance(bad[-1], Failure)
    assert (bad[-1].status, bad[-1].begun) == (Status.INTERNAL, False)
    assert says in bad[-1].message
    assert not [event for event in bad[:-1] if isinstance(event, Failure)]
    alone, _ = with_company(make_engine(), prompt=PROMPTS[4])
    assert answers(found) == answers(alone)
    assert found["d"][0].prompt_logprobs == alone["d"][0].prompt_logprobs
    stats = engine.stats()
    assert (stats.requests_failed, stats.requests_finished) == (1, 4)


def test_a_row_whose_sampling_parameters_cannot_be_applied(make_engine):
    """The model's files name an end token outside its vocabulary, and the request bans end tokens."""
    assert_only_the_culprit_fails(
        make_engine, "IndexError", end_tokens=(2, OUTSIDE), min_tokens=3, ignore_eos=False
    )


@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_that_cannot_be_computed(make_engine, n):
    assert_only_the_culprit_fails(
        make_engine,
        "ValueError: no such thing",
        wrap=lambda executor: Faulty(executor, ValueError("no such thing")),
        prompt=(*PROMPTS[4], MARK),
        n=n,
    )


@pytest.mark.parametrize("part", ["__init__", "push", "finish"])
def test_a_text_that_cannot_be_said(make_engine, monkeypatch, part):
    real = getattr(Detokenizer, part)

    def broken(self, *args, **kwargs):
        if part == "__init__" and "boom" in (*args, *kwargs.values())[2]:
            raise RuntimeError("not a text")
        if part != "__init__" and "boom" in self._stop:
            raise RuntimeError("not a text")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Detokenizer, part, broken)
    assert_only_the_culprit_fails(make_engine, "RuntimeError: not a text", stop=("boom",))


def test_a_request_that_cannot_say_its_last_words_is_over_all_the_same(make_engine, monkeypatch):
    engine = make_engine()
    ask(engine, "bad", PROMPTS[0])
    ask(engine, "good", PROMPTS[1])
    engine.step()
    monkeypatch.setattr(Detokenizer, "finish", lambda self: 1 / 0)
    engine.cancel(RequestId("bad"))
    monkeypatch.undo()
    found = run(engine)
    assert found["bad"][-1].status is Status.INTERNAL
    assert found["good"][-1].usage.output_tokens == 12


def test_the_culprit_is_found_among_many_in_few_steps(make_engine):
    engine = make_engine(wrap=lambda executor: Faulty(executor, ValueError("no such thing")))
    for at in range(16):
        ask(engine, str(at), (5, 6, MARK if at == 11 else 7), max_tokens=1)
    found = run(engine)
    assert [name for name, events in found.items() if isinstance(events[-1], Failure)] == ["11"]
    assert engine._executor.steps <= 1 + 2 * 4


@pytest.mark.parametrize("error", [ReplicaDied("shard 1 is gone"), IntegrityError("page 3 is lost")])
def test_lost_shards_and_wrong_books_are_nobodys_fault(make_engine, error):
    engine = make_engine(wrap=lambda executor: Faulty(executor, error))
    ask(engine, "a", (*PROMPTS[0], MARK))
    ask(engine, "b", PROMPTS[1])
    with pytest.raises(type(error)):
        run(engine)


def test_an_error_after_which_no_step_can_be_computed_ends_the_engine(make_engine):
    engine = make_engine(wrap=lambda executor: Faulty(executor, RuntimeError("CUDA error"), lasting=True))
    ask(engine, "a", (*PROMPTS[0], MARK))
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(engine)


def test_an_engine_that_fails_whatever_comes_says_so_and_ends_them_all_the_same(make_engine):
    engine = make_engine(wrap=lambda executor: Faulty(executor, ValueError("no such thing")))
    for at in range(20):
        ask(engine, str(at), (at + 5, MARK), max_tokens=1)
    assert engine.hopeless is None
    found = run(engine)
    assert all(isinstance(events[-1], Failure) for events in found.values())
    assert str(engine.hopeless) == "no such thing"
    ask(engine, "good", (5, 6), max_tokens=1)
    run(engine)
    assert engine.hopeless is None


def test_tokens_of_others_show_that_the_engine_is_well(make_engine):
    engine = make_engine(wrap=lambda executor: Faulty(executor, ValueError("no such thing")), max_running=2)
    for at in range(30):
        ask(engine, str(at), (at + 5, MARK if at % 3 else 7), max_tokens=1)
    found = run(engine)
    assert sum(isinstance(events[-1], Failure) for events in found.values()) == 20


def test_what_runs_may_be_at_fault_and_what_waits_is_not(make_engine):
    engine = make_engine(max_running=1)
    ask(engine, "runs", PROMPTS[0], max_tokens=100)
    engine.step()
    ask(engine, "waits", PROMPTS[1])
    engine.fail_running(Status.INTERNAL, "it failed")
    engine.fail_all(Status.UNAVAILABLE, "it is gone")
    ended = {e.request_id: (e.status, e.begun) for e in engine.take_events() if isinstance(e, Failure)}
    assert ended == {"runs": (Status.INTERNAL, True), "waits": (Status.UNAVAILABLE, False)}
