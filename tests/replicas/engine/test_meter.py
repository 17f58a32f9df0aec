"""What an engine tells of itself: what it counts over its sequences, and when."""

from recall import mixed_prompts

from quire.replicas.config import EngineConfig, PoolConfig, SchedulerConfig
from quire.replicas.engine.load import load_engine, load_tokenizer
from quire.replicas.engine.pressure import Pressure
from quire.replicas.request import Request, RequestId, SamplingParams


def test_an_engine_counts_what_runs_and_what_waits_but_not_what_is_merely_cached():
    now = 100.0
    config = EngineConfig(
        model="demo",
        kv="bf16",
        threads_per_shard=1,
        pool=PoolConfig(bytes=20 * 196608),
        scheduler=SchedulerConfig(max_running=2),
    )
    engine = load_engine(config)[1]
    engine._clock = lambda: now
    for number, prompt in enumerate(mixed_prompts(load_tokenizer("demo"), [150, 160, 170])):
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        engine.add(Request(id=RequestId(str(number)), prompt=tuple(prompt), sampling=sampling))
    now += 1.0
    engine.step()
    assert engine.pressure.occupancy == 3 / 2  # two run and one waits, of two places
    assert engine.pressure.first_token_s == 1.0
    assert (engine.load.taken, engine.load.running, engine.load.waiting) == (3, 2, 1)
    assert engine.load.queued_tokens == 170
    while engine.has_work:
        now += 0.5
        engine.step()
    now += 30.0
    engine.step()
    assert engine.stats().pages_cached > 0
    assert engine.pressure == Pressure()
    assert (engine.load.running, engine.load.waiting, engine.load.queued_tokens) == (0, 0, 0)
    assert engine.load.prefill_s_per_token == 0.0  # no step took any time on this clock
