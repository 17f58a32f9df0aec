"""Prompts and chats in every shape that callers write them."""

import numpy as np
import pytest

from quire.replicas.errors import InvalidRequest
from quire.replicas.text.prompt import ChatMessage, as_messages, as_prompt, as_prompts

HELLO = (ChatMessage("user", "Hello!"),)
PART = {"type": "text", "text": "Hel"}


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("Hello", ["Hello"]),
        (["Hello", [5, 6]], ["Hello", (5, 6)]),
        ([5, 6], [(5, 6)]),
        ((np.int64(5), 6), [(5, 6)]),
        (np.array([5, 6]), [(5, 6)]),
        (np.array([[5, 6], [7, 8]]), [(5, 6), (7, 8)]),
        ([[]], [()]),
        ([], []),
    ],
)
def test_one_prompt_or_several(given, prompts):
    assert as_prompts(given) == prompts


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "prompts must be a sequence"),
        (5, "prompts must be a sequence"),
        (b"Hello", "prompts must be a sequence"),
        ({"prompt": "Hello"}, "prompts must be a sequence"),
        ({"Hello"}, "prompts must be a sequence"),
        ([5, "Hello"], r"prompts\[0\]"),
        (["Hello", b"Hello"], r"prompts\[1\]"),
        ([[5, 6.0]], r"prompts\[0\]\[1\]"),
        ([[5, True]], r"prompts\[0\]\[1\]"),
        ([[5, -1]], r"prompts\[0\]\[1\]"),
        ([[5, 2**32]], r"prompts\[0\]\[1\]"),
        (["half of \ud83e"], r"prompts\[0\].*surrogate"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_place(given, name):
    with pytest.raises(InvalidRequest, match=name):
        as_prompts(given)


def test_a_single_prompt_is_named_so():
    with pytest.raises(InvalidRequest, match=r"^prompt\[1\]"):
        as_prompt([5, "6"])


@pytest.mark.parametrize(
    "given",
    [
        [{"role": "user", "content": "Hello!"}],
        [{"role": "user", "content": "Hello!", "tool_calls": None}],
        [{"role": "user", "content": [PART, {"type": "text", "text": "lo!"}]}],
    ],
)
def test_a_message_is_a_mapping_whose_content_may_come_in_parts(given):
    assert as_messages(given) == HELLO


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "messages"),
        ("Hello!", "messages"),
        ({"role": "user", "content": "Hello!"}, "messages"),
        (["Hello!"], r"messages\[0\]"),
        (["ab"], r"messages\[0\]"),
        ([{"role": "user", "content": "Hello!"}, ("user", "Hello!")], r"messages\[1\] must be a mapping"),
        ([{"role": "user"}], r"messages\[0\].*'content'"),
        ([{"content": "Hello!"}], r"messages\[0\].*'role'"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": "half of \ud83e"}], r"messages\[0\]\.content.*surrogate"),
        ([{"role": "user", "content": ["Hello!"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [PART, {"type": "image_url"}]}], r"messages\[0\]\.content\[1\]"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"messages\[0\]\.content\[0\]\.text"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], r"messages\[0\].*tool_calls"),
        ([{"role": "user", "content": "x", "name": "Ann"}], r"messages\[0\].*name"),
        ([{"role": 5, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "x" * 100, "content": "x"}], r"messages\[0\]\.role"),
    ],
)
def test_what_is_no_message_is_refused_by_its_place(given, name):
    with pytest.raises(InvalidRequest, match=name):
        as_messages(given)
