"""The blocking client against a gateway in another thread; other tests use the asynchronous one."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from gateway_thread import gateway_thread

from quire.cluster import Answer, CallOptions, Client, SamplingParams, collect
from quire.cluster.api.status import Cancelled, error_of_rpc
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import DeadlinePassed, InvalidRequest, ReplicaDied, UnknownModel


@pytest.fixture
def gateway():
    """The address of one that answers with three tokens; a prompt of 13 with one, and no end."""
    with gateway_thread(_three_tokens) as address:
        yield address


def _three_tokens(engine, request):
    engine.say(request, "one ", 1)
    if request.prompt != (13,):
        engine.say(request, "two ", 2)
        engine.say(request, "three", 3, last=True)


def test_deltas_are_iterated_and_collected(gateway):
    with Client(gateway) as client:
        assert "".join(d.text for d in client.generate([5, 6])) == "one two three"
        answer = collect(client.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=3)))
        assert (answer.text, answer.outputs[0].token_ids) == ("one two three", [1, 2, 3])
        assert answer.outputs[0].finish_reason == inference_pb2.FINISH_REASON_STOP
        assert answer.usage.output_tokens == 9


def test_the_smaller_calls_answer(gateway):
    with Client(gateway) as client:
        ids = client.tokenize("Long ago")
        assert client.detokenize(ids) == "Long ago"
        assert len(client.tokenize(messages=[{"role": "user", "content": "Long ago"}])) > len(ids)
        assert client.model().name == "demo"
        assert client.stats().replicas[0].pages_total == 7
        assert not client.cancel("nobody")


async def test_a_blocking_client_may_be_used_where_an_event_loop_runs(gateway):
    with Client(gateway) as client:
        assert collect(client.generate([5, 6])).text == "one two three"
        for _ in client.generate([13]):
            break


def test_threads_may_share_a_client(gateway):
    with Client(gateway) as client, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: collect(client.generate([5, 6])).text, range(8)))
    assert answers == ["one two three"] * 8


def test_errors_are_the_servers_own(gateway):
    with Client(gateway) as client:
        with pytest.raises(UnknownModel):
            collect(client.generate("a", options=CallOptions(model="x")))
        with pytest.raises(InvalidRequest, match=r"prompt\[0\] must be a token id"):
            collect(client.generate([-1]))
        with pytest.raises(DeadlinePassed):
            collect(client.generate([13], options=CallOptions(deadline_s=0.2)))


def test_leaving_the_loop_ends_the_request(gateway):
    with Client(gateway) as client:
        for delta in client.generate([13]):
            assert delta.text == "one "
            break
        deadline = time.monotonic() + 60
        while client.stats().gateway_open_requests:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_nobody_listening_is_unavailable():
    with Client("127.0.0.1:1") as client, pytest.raises(ReplicaDied):
        client.model()


def test_an_answer_keeps_outputs_apart():
    answer = Answer()
    for index, text in ((1, "b"), (0, "a"), (1, "B")):
        answer.add(inference_pb2.Delta(index=index, text=text, token_ids=[index]))
    assert (answer.text, answer.outputs[1].text, answer.outputs[1].token_ids) == ("a", "bB", [1, 1])


@pytest.mark.parametrize(
    ("details", "kind"),
    [("", ReplicaDied), ("CANCELLED", ReplicaDied), ("Locally cancelled by application!", Cancelled)],
)
def test_a_call_that_the_gateway_cancels_may_be_tried_again(details, kind):
    error = grpc.RpcError()
    error.code, error.details, error.trailing_metadata = (
        lambda: grpc.StatusCode.CANCELLED,
        lambda: details,
        tuple,
    )
    assert type(error_of_rpc(error)) is kind
