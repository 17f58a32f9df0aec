"""What a client refuses before it sends anything."""

import math

import numpy as np
import pytest

from quire.cluster import CallOptions, Client, SamplingParams
from quire.cluster.api.requests import chat_request, detokenize_request, generate_request, tokenize_request
from quire.replicas.errors import InvalidRequest

NONE = CallOptions()


def test_a_chat_sends_roles_and_contents():
    mappings = [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}
    ]
    for messages in (mappings, [{"role": "user", "content": "Hello!"}]):
        (sent,) = chat_request(messages, None, NONE).messages
        assert (sent.role, sent.content) == ("user", "Hello!")
        assert tokenize_request("", messages).messages[0] == sent


def test_prompts_and_ids_of_numpy_are_sent_as_they_are():
    assert generate_request("Hello", None, NONE).text == "Hello"
    assert list(generate_request(np.array([5, 6]), None, NONE).token_ids.ids) == [5, 6]
    assert list(detokenize_request(np.array([5, 6])).token_ids) == [5, 6]


def test_what_is_not_said_is_not_sent_and_an_explicit_zero_is():
    unsaid = generate_request("Hello", None, NONE).sampling
    assert not any(unsaid.HasField(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    greedy = generate_request("Hello", SamplingParams(temperature=0), NONE).sampling
    assert greedy.HasField("temperature")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: chat_request([{"role": "user", "content": None}], None, NONE), r"messages\[0\]\.content"),
        (lambda: chat_request("Hello!", None, NONE), "messages"),
        (lambda: chat_request([("user", "Hello!")], None, NONE), r"messages\[0\] must be a mapping"),
        (lambda: generate_request(["Hello"], None, NONE), r"prompt\[0\]"),
        (lambda: generate_request(None, None, NONE), "prompt"),
        (lambda: generate_request("half of \ud83e", None, NONE), "prompt.*surrogate"),
        (lambda: generate_request("a", {"max_tokens": 3}, NONE), "sampling must be SamplingParams"),
        (lambda: generate_request("a", None, {"deadline_s": 3}), "options must be CallOptions"),
        (lambda: tokenize_request(None, ()), "text must be"),
        (lambda: detokenize_request("12"), "token_ids"),
        (lambda: detokenize_request([1.5]), r"token_ids\[0\]"),
    ],
)
def test_what_no_request_can_carry_is_refused_by_name(build, said):
    with pytest.raises(InvalidRequest, match=said):
        build()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deadline_s", math.nan),
        ("deadline_s", -1),
        ("deadline_s", 0),
        ("deadline_s", math.inf),
        ("deadline_s", 1e12),
        ("deadline_s", "5"),
        ("priority", 101),
        ("priority", 0.5),
        ("priority", None),
        ("request_id", "x" * 257),
        ("request_id", 7),
        ("tenant", "x" * 1_000_000),
        ("tenant", None),
        ("tenant", "half of \ud83e"),
        ("model", None),
        ("explain_routing", 1),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=rf"^{name}\b"):
        CallOptions(**{name: value})


def test_a_clients_methods_refuse_without_a_gateway():
    with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match=r"messages\[0\]"):
            client.chat(["Hello!"])
        with pytest.raises(InvalidRequest, match="text must be"):
            client.tokenize(5)
        with pytest.raises(InvalidRequest, match="request_id must be"):
            client.cancel(5)
        with pytest.raises(InvalidRequest, match="options must be CallOptions"):
            client.generate("a", options={})
