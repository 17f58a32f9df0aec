"""Prompts to token ids and back, by the model's own tokenizer; during an upgrade there are two of them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from quire.cluster.gateway.tokenizing import Tokenizing
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import ConfigError, InvalidRequest
from quire.replicas.text.prompt import as_messages
from quire.replicas.text.tokenize import PromptTokenizer
from quire.replicas.text.tokenizer_files import open_tokenizer

_KEPT = 4
_BYTES_PER_TOKEN = 4
"""Estimated cost of turning a token id into text, as bytes of text to tokenize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """What a client wants continued, before any model has read it: exactly one of the three is set."""

    text: str | None = None
    messages: Sequence[inference_pb2.ChatMessage] | None = None
    token_ids: Sequence[int] | None = None

    @staticmethod
    def of(request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest) -> PromptSource:
        """Return the prompt of a request. Raises InvalidRequest if it has none."""
        if isinstance(request, inference_pb2.ChatRequest):
            return PromptSource(messages=request.messages)
        match request.WhichOneof("prompt"):
            case "text":
                return PromptSource(text=request.text)
            case "token_ids":
                return PromptSource(token_ids=request.token_ids.ids)
        raise InvalidRequest("the request has no prompt; set text or token_ids")


class ChatTokenizer:
    """One model's tokenizer and chat template. Safe to use from several tasks: it is only read."""

    def __init__(self, files: Mapping[str, bytes], tokenizing: Tokenizing) -> None:
        """`files` by their paths in the model's folder. Raises ConfigError or ModelNotServable if they make
        no tokenizer.
        """
        self._tokenizing = tokenizing
        with TemporaryDirectory(prefix="quire-tokenizer-") as name:
            folder = Path(name).resolve()
            for path, content in files.items():
                _write(folder, path, content)
            tokenizer = open_tokenizer(folder)
            if tokenizer is None:
                raise ConfigError(
                    f"no tokenizer could be read from {', '.join(files) or 'no file at all'}. Gateways need "
                    "tokenizer.json and tokenizer_config.json beside the model's weights"
                )
            self._tokenizer = PromptTokenizer(tokenizer)

    async def encode(self, prompt: PromptSource, most_tokens: int) -> Sequence[int]:
        """Return the prompt's token ids. Raises InvalidRequest, also for too long texts, and QueueFull."""
        tokenizer = self._tokenizer
        if prompt.token_ids is not None:
            return prompt.token_ids
        if (text := prompt.text) is not None:
            tokenizer.check_length(len(text), most_tokens)
            return await self._tokenizing.run(
                len(text.encode()), lambda stopped: tokenizer.encode(text, most_tokens, stopped)
            )
        messages = prompt.messages or ()
        tokenizer.check_messages(len(messages), most_tokens)

        def encode_chat(stopped: Callable[[], bool]) -> list[int]:
            turns = as_messages([{"role": one.role, "content": one.content} for one in messages])
            return tokenizer.encode_chat(turns, most_tokens, stopped)

        return await self._tokenizing.run(sum(m.ByteSize() for m in messages), encode_chat)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of these tokens, without special tokens. Raises QueueFull."""
        ids = list(token_ids)
        return await self._tokenizing.run(
            _BYTES_PER_TOKEN * len(ids), lambda stopped: self._tokenizer.decode(ids)
        )


class Tokenizers:
    """The tokenizers of all models among the replicas, each made once."""

    def __init__(self, tokenizing: Tokenizing | None = None) -> None:
        """`tokenizing`: where all of them do their work."""
        self._tokenizing = tokenizing or Tokenizing()
        self._made: OrderedDict[bytes, ChatTokenizer] = OrderedDict()
        self._making = asyncio.Lock()

    async def of(self, digest: bytes, fetch: Callable[[], Awaitable[Mapping[str, bytes]]]) -> ChatTokenizer:
        """Return the tokenizer with this digest; `fetch` gets its files if it is new.

        Raises ConfigError, ModelNotServable, and what `fetch` raises.
        """
        async with self._making:
            if digest not in self._made:
                self._made[digest] = await asyncio.to_thread(ChatTokenizer, await fetch(), self._tokenizing)
            self._made.move_to_end(digest)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return self._made[digest]


def _write(folder: Path, path: str, content: bytes) -> None:
    target = (folder / path).resolve()
    if not target.is_relative_to(folder):
        raise ConfigError(f"a tokenizer's file is called {path!r}, which leads out of its folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
