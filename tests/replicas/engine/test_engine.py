"""The engine over the demo model: what requests may ask for, how they end, and what they leave behind."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from overlapping import Overlapping
from recall import mixed_prompts, recall_prompt

from quire.replicas.config import EngineConfig, PoolConfig, SchedulerConfig
from quire.replicas.engine.engine import Engine
from quire.replicas.engine.load import load_engine, load_tokenizer
from quire.replicas.errors import InvalidRequest, Status
from quire.replicas.request import Failure, FinishReason, Output, Request, RequestId, SamplingParams

TOKENIZER = load_tokenizer("demo")
STORY = tuple(mixed_prompts(TOKENIZER, [150])[0])
_TURNS = [{"role": "user", "content": "Hello"}]
HELLO = tuple(TOKENIZER.apply_chat_template(_TURNS, add_generation_prompt=True, return_dict=False))


def _engine(
    pages: int = 40, max_model_tokens: int | None = None, overlapped: bool = False, **scheduler: int
) -> Engine:
    config = EngineConfig(
        model="demo",
        kv="bf16",
        threads_per_shard=1,
        max_model_tokens=max_model_tokens,
        pool=PoolConfig(bytes=pages * 196608),
        scheduler=SchedulerConfig(**scheduler),
    )
    executor, engine = load_engine(config)
    if overlapped:
        engine._executor = Overlapping(executor)
    return engine


@pytest.fixture(params=["in turn", "overlapped"])
def make_engine(request) -> Callable[..., Engine]:
    """Engines over the demo model, whose steps run one after the other, or each while the last one runs."""
    return partial(_engine, overlapped=request.param == "overlapped")


@pytest.fixture
def engine(make_engine) -> Engine:
    return make_engine()


def _request(name: str, prompt: tuple[int, ...] = STORY, **fields) -> Request:
    request_fields = {k: fields.pop(k) for k in ("priority", "tenant", "deadline_s") if k in fields}
    sampling = SamplingParams(**({"max_tokens": 8, "ignore_eos": True} | fields))
    return Request(id=RequestId(name), prompt=prompt, sampling=sampling, **request_fields)


def _run(engine: Engine) -> dict[str, list[Output]]:
    """Step until nothing is left; every request's events."""
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event)
    engine.check()
    assert engine.stats().pages_used == 0
    return found


def _tokens(outputs: list[Output], index: int = 0) -> list[int]:
    return [t for o in outputs if o.index == index for t in o.token_ids]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), {}, "prompt is empty"),
        ((1, 4096), {}, "token id 4096 is not in the model's vocabulary 0..4095"),
        ((1, -1), {}, "token id -1"),
        ((5,) * 4096, {}, "the prompt has 4096 tokens; this model serves 4096"),
        ((5,) * 2000, {"max_tokens": 1000}, "need 3000 tokens of KV; the pool holds 2560"),
        ((5,), {"stop_token_ids": (9999,)}, "stop_token_ids holds 9999"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(engine, prompt, sampling, message):
    with pytest.raises(InvalidRequest, match=message):
        engine.validate(_request("bad", prompt, **sampling))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("min_tokens", 9), ("temperature", -1.0), ("temperature", float("nan")),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0), ("frequency_penalty", float("nan")), ("logprobs", 21),
        ("prompt_logprobs", -1), ("n", 0), ("n", 17), ("stop", ("",)), ("stop", ("a",) * 17),
        ("stop", ("a" * 257,)), ("stop_token_ids", (1,) * 65), ("temperature", 1e-38), ("temperature", 1e39),
        ("repetition_penalty", 1e-300),
    ],
)  # fmt: skip
def test_impossible_sampling_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=field):
        SamplingParams(**({"max_tokens": 8} | {field: value}))


def test_a_fact_told_far_back_is_recalled(engine):
    prompt, code = recall_prompt(TOKENIZER, 1, 700)
    engine.add(_request("r", tuple(prompt), max_tokens=6, ignore_eos=False))
    assert code in "".join(o.text for o in _run(engine)["r"])


def test_the_last_event_alone_carries_usage_and_timings(engine):
    engine.add(_request("a"))
    *before, last = _run(engine)["a"]
    assert all(o.usage is None and o.finish_reason is None for o in before)
    assert last.finish_reason is FinishReason.LENGTH
    assert (last.usage.prompt_tokens, last.usage.cached_tokens, last.usage.output_tokens) == (150, 0, 8)
    assert 0 <= last.timings.queue_s <= last.timings.first_token_s <= last.timings.total_s


def test_output_ends_with_an_end_token_a_stop_token_or_a_stop_text(engine):
    engine.add(_request("free", max_tokens=30))
    tokens = _tokens(_run(engine)["free"])
    text = TOKENIZER.decode(tokens)
    word = text.split()[3]
    engine.add(_request("token", max_tokens=30, stop_token_ids=(tokens[5],)))
    engine.add(_request("text", max_tokens=30, stop=(word,)))
    found = _run(engine)
    first = tokens.index(tokens[5])
    assert _tokens(found["token"]) == tokens[: first + 1]
    assert found["token"][-1].finish_reason is FinishReason.STOP
    said = "".join(o.text for o in found["text"])
    assert said == text[: text.index(word)]
    assert found["text"][-1].finish_reason is FinishReason.STOP


def test_no_stop_counts_before_min_tokens(engine):
    engine.add(_request("free", max_tokens=30))
    tokens = _tokens(_run(engine)["free"])
    stop = TOKENIZER.decode(tokens).split()[1]
    engine.add(_request("m", max_tokens=30, min_tokens=20, stop_token_ids=(tokens[0],), stop=(stop,)))
    outputs = _run(engine)["m"]
    assert len(_tokens(outputs)) >= 20
    assert tokens[0] not in _tokens(outputs)[:19]


def test_a_special_token_given_as_a_stop_text_ends_the_output(engine):
    end = engine.info.eos_token_ids[0]
    text = TOKENIZER.decode([end])
    engine.add(_request("a", HELLO, max_tokens=60, stop=(text,)))
    *_, last = _run(engine)["a"]
    assert (last.token_ids, last.finish_reason) == ((end,), FinishReason.STOP)


def test_an_ignored_end_token_may_come_before_min_tokens(engine):
    for name, least in [("none", 0), ("all", 40)]:
        engine.add(_request(name, HELLO, max_tokens=40, min_tokens=least))
    found = _run(engine)
    assert _tokens(found["none"]) == _tokens(found["all"])
    assert engine.info.eos_token_ids[0] in _tokens(found["all"])


def test_the_models_longest_sequence_ends_the_output(make_engine):
    engine = make_engine(max_model_tokens=160)
    engine.add(_request("a", max_tokens=100))
    outputs = _run(engine)["a"]
    assert len(_tokens(outputs)) == 10
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_seed_repeats_and_seeds_differ(engine):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        engine.add(_request(name, temperature=1.0, seed=seed, max_tokens=16))
    found = {name: _tokens(outputs) for name, outputs in _run(engine).items()}
    assert found["a"] == found["b"] != found["c"]


def test_n_outputs_differ_share_the_prompts_pages_and_count_together(engine):
    engine.add(_request("n", temperature=1.0, seed=3, n=3))
    outputs = _run(engine)["n"]
    texts = [_tokens(outputs, i) for i in range(3)]
    assert len({tuple(t) for t in texts}) == 3
    assert outputs[-1].usage.output_tokens == 24
    assert sum(o.usage is not None for o in outputs) == 1
    assert engine.stats().prompt_tokens == 150 + 2 * (150 - 128)  # two full blocks were shared, twice


def test_logprobs_and_prompt_logprobs_tell_the_same(engine):
    engine.add(_request("a", logprobs=2, max_tokens=20))
    outputs = _run(engine)["a"]
    told = [p for o in outputs for p in o.logprobs]
    assert [p.token_id for p in told] == [p.top[0][0] for p in told]  # greedy took the likeliest
    engine.add(_request("b", (*STORY, *_tokens(outputs)), prompt_logprobs=2, max_tokens=1))
    prompt_logprobs = _run(engine)["b"][0].prompt_logprobs
    assert len(prompt_logprobs) == 169
    assert list(prompt_logprobs[-20:]) == told


def test_penalties_keep_tokens_from_coming_back(engine):
    engine.add(_request("plain", max_tokens=40))
    engine.add(_request("penalized", max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0))
    found = {name: _tokens(outputs) for name, outputs in _run(engine).items()}
    assert len(set(found["penalized"])) > len(set(found["plain"]))


def test_a_cancelled_request_gives_its_pages_back_at_once(engine):
    engine.add(_request("a", max_tokens=100))
    engine.add(_request("b", max_tokens=4))
    while engine.stats().output_tokens < 4:
        engine.step()
    engine.cancel(RequestId("a"))
    held = engine.stats().pages_used
    found = _run(engine)
    assert held == 3  # b's alone
    assert found["a"][-1].finish_reason is FinishReason.CANCELLED
    assert found["a"][-1].usage.output_tokens == 2
    assert len(_tokens(found["b"])) == 2  # the first two came before


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_every_open_output_of_a_cancelled_request_says_so_once(engine, steps):
    engine.add(_request("a", n=3, temperature=1.0, max_tokens=50))
    for _ in range(steps):
        engine.step()
    engine.cancel(RequestId("a"))
    ended = [o for o in _run(engine)["a"] if o.finish_reason]
    assert [(o.index, o.finish_reason) for o in ended] == [(i, FinishReason.CANCELLED) for i in range(3)]
    assert [o.usage is None for o in ended] == [True, True, False]


SIX = {"n": 6, "temperature": 1.0, "seed": 1, "max_tokens": 60}


@pytest.fixture(scope="module")
def six_without_preemption() -> list[list[int]]:
    """The six outputs of one request where there is room for all of them."""
    engine = _engine(pages=60)
    engine.add(_request("n", **SIX))
    outputs = _run(engine)["n"]
    assert engine.stats().preemptions == 0
    return [_tokens(outputs, i) for i in range(6)]


@pytest.mark.parametrize("pages", [7, 8, 9, 11])
def test_outputs_that_share_pages_survive_preemption(pages, make_engine, six_without_preemption):
    engine = make_engine(pages)
    engine.add(_request("n", **SIX))
    outputs = _run(engine)["n"]
    assert outputs[-1].usage.output_tokens == 6 * SIX["max_tokens"]
    assert engine.stats().preemptions > 0
    assert [_tokens(outputs, i) for i in range(6)] == six_without_preemption


def test_cancelling_the_unknown_changes_nothing(engine):
    engine.cancel(RequestId("nobody"))
    assert not engine.has_work


def test_a_deadline_that_passes_in_the_queue_fails_the_request_alone(make_engine):
    now = [0.0]
    engine = make_engine(max_running=1)
    engine._clock = lambda: now[0]
    engine.add(_request("first"))
    engine.add(_request("late", deadline_s=5.0))
    engine.step()
    now[0] = 6.0
    found = _run(engine)
    assert found["late"] == [Failure(RequestId("late"), Status.DEADLINE_EXCEEDED, found["late"][0].message)]
    assert "6.00 s in the queue" in found["late"][0].message
    assert found["first"][-1].finish_reason is FinishReason.LENGTH


def test_priority_goes_before_arrival(make_engine):
    engine = make_engine(max_running=1)
    for name, priority in [("a", 0), ("b", 0), ("c", 1)]:
        engine.add(_request(name, priority=priority, max_tokens=2))
    ended = [name for name, outputs in _run(engine).items() if outputs]
    assert ended == ["c", "a", "b"]


def test_a_higher_priority_takes_the_slot_and_the_preempted_answer_stays_right(make_engine):
    engine = make_engine(max_running=1)
    engine.add(_request("low", priority=-1, max_tokens=80))
    engine.step()
    engine.add(_request("high", (8, 9), max_tokens=2, priority=1))
    found, order = {"low": [], "high": []}, []
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event)
            order += [event.request_id] if event.usage else []
    assert order == ["high", "low"]
    assert engine.stats().preemptions == 1
    engine.add(_request("again", max_tokens=80))
    assert _tokens(_run(engine)["again"])[-70:] == _tokens(found["low"])[-70:]


def test_a_short_prompt_has_its_first_token_while_a_long_one_is_computed(make_engine):
    engine = make_engine(pages=60, max_step_tokens=64)
    engine.add(_request("long", STORY * 9, max_tokens=1))
    engine.step()
    engine.add(_request("short", STORY[:20], max_tokens=1))
    assert next(iter(_run(engine))) == "short"


def test_a_finished_answer_is_found_again_by_the_next_turn(engine):
    engine.add(_request("a", max_tokens=50))
    answer = _tokens(_run(engine)["a"])
    engine.add(_request("b", (*STORY, *answer, 7, 8, 9)))
    assert _run(engine)["b"][-1].usage.cached_tokens == 192  # 3 blocks, the third partly of output


def test_more_sequences_than_pages_all_end_right(make_engine):
    many, few = make_engine(pages=60), make_engine(pages=9)
    prompts = [tuple(p) for p in mixed_prompts(TOKENIZER, [100, 130, 60, 20, 90, 140])]
    answers = []
    for engine in (many, few):
        for i, prompt in enumerate(prompts):
            engine.add(_request(str(i), prompt, max_tokens=50))
        answers.append({name: _tokens(outputs) for name, outputs in _run(engine).items()})
    assert answers[0] == answers[1]
    assert few.stats().preemptions > 0 == many.stats().preemptions


def _answers(engine: Engine) -> dict[str, list[tuple[list[int], str, FinishReason | None]]]:
    """Requests of many kinds on one engine: tokens, text and end of every output."""
    prompts = [tuple(p) for p in mixed_prompts(TOKENIZER, [100, 130, 60, 20, 90, 140, 64, 63])]
    asked = [
        {"max_tokens": 70},
        {"max_tokens": 40, "ignore_eos": False},
        {"max_tokens": 30, "temperature": 0.9, "seed": 5, "n": 3},
        {"max_tokens": 50, "temperature": 1.2, "seed": 6, "top_p": 0.8, "top_k": 40},
        {"max_tokens": 60, "stop": ("the", "a")},
        {"max_tokens": 1},
        {"max_tokens": 20, "logprobs": 2, "prompt_logprobs": 1, "min_tokens": 5},
        {"max_tokens": 33, "temperature": 0.7, "seed": 7, "min_p": 0.1},
    ]
    for i, (prompt, sampling) in enumerate(zip(prompts, asked, strict=True)):
        engine.add(_request(str(i), prompt, **sampling))
    found = _run(engine)
    return {
        name: [
            (
                _tokens(outputs, index),
                "".join(o.text for o in outputs if o.index == index),
                next(o.finish_reason for o in reversed(outputs) if o.index == index),
            )
            for index in range(asked[int(name)].get("n", 1))
        ]
        for name, outputs in found.items()
    }


@pytest.mark.parametrize("pages", [60, 11])
def test_overlapped_steps_give_the_answers_of_steps_in_turn(pages):
    in_turn, overlapped = _engine(pages), _engine(pages, overlapped=True)
    assert _answers(overlapped) == _answers(in_turn)
    assert overlapped._executor.handed_on > 100
    assert (overlapped.stats().preemptions > 0) == (pages == 11)


def test_a_penalized_request_waits_for_its_own_tokens(make_engine):
    engine = make_engine()
    engine.add(_request("a", repetition_penalty=1.3, max_tokens=30))
    alone = _tokens(_run(engine)["a"])
    for name, penalty in (("a", 1.3), ("b", 1.0)):
        engine.add(_request(name, repetition_penalty=penalty, max_tokens=30))
    assert _tokens(_run(engine)["a"]) == alone


class _Damaged:
    """An executor whose third step returns numbers that are not finite for its first row."""

    def __init__(self, executor):
        self._executor, self._steps = executor, 0

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def run(self, batch, drawn=None):
        self._steps += 1
        logits = self._executor.run(batch, drawn).clone()
        if self._steps == 3:
            logits[0] = torch.nan
        return logits


def test_numbers_that_are_not_finite_fail_their_request_and_no_other(engine):
    engine._executor = _Damaged(engine._executor)
    engine.add(_request("a"))
    engine.add(_request("b"))
    found = _run(engine)
    assert found["a"][-1].status is Status.INTERNAL
    assert "not finite" in found["a"][-1].message
    assert len(_tokens(found["b"])) == 8
    stats = engine.stats()
    assert (stats.nonfinite_outputs, stats.requests_failed, stats.requests_finished) == (1, 1, 1)
    assert all(seconds > 0 for seconds in stats.step_part_seconds.values())
    assert sum(stats.step_part_seconds.values()) == stats.step_seconds


def test_blocks_of_a_request_that_went_wrong_are_not_shared(engine):
    real, engine._executor = engine._executor, _Damaged(engine._executor)
    engine.add(_request("a"))
    _run(engine)
    engine._executor = real
    engine.add(_request("b"))
    assert _run(engine)["b"][-1].usage.cached_tokens == 0
