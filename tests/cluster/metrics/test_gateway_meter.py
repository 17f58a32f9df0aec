import pytest

from quire.cluster.metrics.gateway_meter import Answered, Meter
from quire.protos.quire.v1 import inference_pb2


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


async def _drop(delta):
    pass


def _delta(*tokens, index=0, usage=None):
    delta = inference_pb2.Delta(index=index, token_ids=tokens)
    if usage is not None:
        delta.usage.prompt_tokens, delta.usage.output_tokens = usage
        delta.timings.queue_s = 0.5
    return delta


async def _ask(messages, status="OK"):
    """A call that gets messages at their times; what the meter hands on, and the meter."""
    clock, answered = Clock(), []
    meter = Meter(answered.append, clock)
    with meter.call("Chat") as watch:
        send = watch.watched(_drop)
        for at_s, delta in messages:
            clock.now = 100.0 + at_s
            await send(delta)
        watch.status = status
    return answered, meter


async def test_latencies_are_those_of_the_client():
    messages = [(1.0, _delta(1)), (1.5, _delta(2, 3)), (4.0, _delta(4)), (5.0, _delta(5, usage=(7, 5)))]
    (answered,), meter = await _ask(messages)
    assert answered == Answered(
        first_token_s=1.0,
        inter_token_s=1.0,  # 4 s for the four tokens after the first
        longest_pause_s=2.5,
        total_s=5.0,
        queue_s=0.5,
        prompt_tokens=7,
        output_tokens=5,
    )
    assert meter.outcomes == {("Chat", "OK"): 1}


async def test_several_outputs_grow_beside_each_other():
    messages = [
        (1.0, _delta(1)),
        (1.0, _delta(1, index=1)),
        (3.0, _delta(2)),
        (3.0, _delta(2, index=1, usage=(1, 4))),
    ]
    (answered,), _ = await _ask(messages)
    assert answered.inter_token_s == 2.0


async def test_one_token_has_no_gap_and_no_pause():
    (answered,), _ = await _ask([(2.0, _delta(1, usage=(1, 1)))])
    assert (answered.inter_token_s, answered.longest_pause_s) == (None, None)
    assert answered.first_token_s == 2.0


async def test_what_failed_or_said_nothing_is_counted_and_not_timed():
    answered, meter = await _ask([(1.0, _delta(1))], status="UNAVAILABLE")
    assert not answered
    assert meter.outcomes == {("Chat", "UNAVAILABLE"): 1}
    answered, meter = await _ask([(1.0, _delta(usage=(3, 0)))])
    assert not answered
    assert meter.outcomes == {("Chat", "OK"): 1}


async def test_messages_pass_unchanged_and_a_client_that_is_gone_is_seen():
    meter, sent = Meter(), []

    async def send(delta):
        sent.append(delta)
        raise ConnectionError

    delta = _delta(1, usage=(1, 1))
    with meter.call("Generate") as watch, pytest.raises(ConnectionError):
        await watch.watched(send)(delta)
    assert sent == [delta]
