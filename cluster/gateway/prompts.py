"""Text and chats to token ids and back, by the model's own tokenizer; of several models during an upgrade."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import AutoTokenizer

from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import ConfigError, InvalidRequest

_INLINE_SIZE = 2_000
"""Characters or tokens. More is worked on in a thread, or it would hold up everyone else's tokens."""

_KEPT = 4

T = TypeVar("T")


class Prompts:
    """Safe to use from several tasks; the tokenizer is only read."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Raises ConfigError if no tokenizer can be read from the files, which have names."""
        with TemporaryDirectory(prefix="quire-tokenizer-") as folder:
            for name, content in files.items():
                Path(folder, Path(name).name).write_bytes(content)
            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"no tokenizer could be read from {', '.join(files) or 'no file at all'}: {error}. "
                    "Gateways need tokenizer.json and tokenizer_config.json beside the model's weights"
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


class Tokenizers:
    """The prompts of every tokenizer there is among the replicas, each made once."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[bytes, Prompts] = OrderedDict()
        self._making = asyncio.Lock()

    async def of(self, digest: bytes, fetch: Callable[[], Awaitable[Mapping[str, bytes]]]) -> Prompts:
        """`fetch` gives the files if the digest is new. Raises ConfigError, and what `fetch` raises."""
        async with self._making:
            if digest not in self._prompts:
                files = await fetch()
                self._prompts[digest] = await asyncio.to_thread(Prompts, files)
            self._prompts.move_to_end(digest)
            while len(self._prompts) > _KEPT:
                self._prompts.popitem(last=False)
            return self._prompts[digest]


async def _in_its_place(size: int, work: Callable[[], T]) -> T:
    return work() if size <= _INLINE_SIZE else await asyncio.to_thread(work)
