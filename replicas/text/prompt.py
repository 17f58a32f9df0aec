"""What a prompt may be: a text, token ids, or the messages of a chat.

Offline batches, clients, the command line and gateways all read them here. Pure: no tokenizer, no template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.replicas.errors import InvalidRequest
from quire.replicas.values import is_whole, items, shown, text, token_ids

Prompt = str | Sequence[int]
"""A text, or token ids."""
Messages = Sequence[Mapping[str, Any]]
"""The messages of a chat, oldest first: {"role": "user", "content": "..."}.

Content may be a list of text parts as well: [{"type": "text", "text": "..."}].
"""
_MAX_ROLE_CHARACTERS = 64
_EXAMPLE = '{"role": "user", "content": "Hello!"}'


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat."""

    role: str
    """"system", "user" or "assistant", or what else the model's chat template knows."""
    content: str


def as_prompt(value: Any, name: str = "prompt") -> str | tuple[int, ...]:
    """Check one prompt. Raises InvalidRequest."""
    if isinstance(value, str):
        return text(name, value)
    return token_ids(name, items(name, value, "token ids, or a text"))


def as_prompts(value: Any) -> list[str | tuple[int, ...]]:
    """Check several prompts, or a single one: a text, or a sequence of whole numbers only.

    Raises InvalidRequest.
    """
    if isinstance(value, str):
        return [as_prompt(value)]
    several = items("prompts", value, "prompts, each a text or token ids")
    if several and all(map(is_whole, several)):
        return [as_prompt(several)]
    return [as_prompt(one, f"prompts[{i}]") for i, one in enumerate(several)]


def as_messages(value: Any) -> tuple[ChatMessage, ...]:
    """Check the messages of a chat. Raises InvalidRequest, which names messages[i]."""
    messages = items("messages", value, f"mappings such as {_EXAMPLE}")
    return tuple(_message(f"messages[{i}]", one) for i, one in enumerate(messages))


def _message(name: str, value: Any) -> ChatMessage:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be a mapping such as {_EXAMPLE}, got {shown(value)}")
    role, content = _role_and_content(name, value)
    role = text(f"{name}.role", role, _MAX_ROLE_CHARACTERS)
    if not role:
        raise InvalidRequest(f'{name}.role is empty; give "system", "user" or "assistant"')
    return ChatMessage(role, _content(f"{name}.content", content))


def _role_and_content(name: str, message: Mapping[str, Any]) -> tuple[Any, Any]:
    """A field that is None says nothing; tool calls, names and the like are not served yet."""
    others = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if others:
        raise InvalidRequest(f"{name} has {shown(others[0])}; a message has a role and a content, no more")
    for key in ("role", "content"):
        if key not in message:
            raise InvalidRequest(f"{name} has no {key!r}; give both a role and a content")
    return message["role"], message["content"]


def _content(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return "".join(_part(f"{name}[{i}]", part) for i, part in enumerate(value))
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a text (str) or a list of text parts, got {shown(value)}")
    return text(name, value)


def _part(name: str, part: Any) -> str:
    if not isinstance(part, Mapping) or set(part) != {"type", "text"} or part["type"] != "text":
        raise InvalidRequest(
            f'{name} must be {{"type": "text", "text": ...}}, the only kind of part served, got {shown(part)}'
        )
    return text(f"{name}.text", part["text"])
