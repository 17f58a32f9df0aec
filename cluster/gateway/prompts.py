"""Text and chats to token ids and back, by the model's own tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import AutoTokenizer

from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import ConfigError, InvalidRequest

_INLINE_SIZE = 2_000
"""Characters or tokens. More is worked on in a thread, or it would hold up everyone else's tokens."""

T = TypeVar("T")


class Prompts:
    """Safe to use from several tasks; the tokenizer is only read."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if `folder` holds no tokenizer."""
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no tokenizer could be read from {folder}: {error}. "
                "The gateway needs tokenizer.json and tokenizer_config.json beside the model's weights"
            ) from error

    async def encode(self, text: str) -> list[int]:
        """With the special tokens the tokenizer puts in front."""
        return await self._encode(text, special=True)

    async def encode_chat(self, messages: Sequence[inference_pb2.ChatMessage]) -> list[int]:
        """The prompt of the assistant's next turn. Raises InvalidRequest if the template refuses the chat."""
        if not messages:
            raise InvalidRequest("the chat has no messages; send at least one")
        if self._tokenizer.chat_template is None:
            raise InvalidRequest("this model has no chat template; use Generate with a prompt of your own")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        size = sum(len(turn["content"]) for turn in turns) + len(turns)
        return await _in_its_place(size, lambda: self._encode_chat_now(turns))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""
        ids = list(token_ids)
        return await _in_its_place(
            len(ids), lambda: str(self._tokenizer.decode(ids, skip_special_tokens=True))
        )

    async def _encode(self, text: str, *, special: bool) -> list[int]:
        return await _in_its_place(len(text), lambda: self._encode_now(text, special))

    def _encode_chat_now(self, turns: list[dict[str, str]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error
        return self._encode_now(text, special=False)

    def _encode_now(self, text: str, special: bool) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return token_ids


async def _in_its_place(size: int, work: Callable[[], T]) -> T:
    return work() if size <= _INLINE_SIZE else await asyncio.to_thread(work)
