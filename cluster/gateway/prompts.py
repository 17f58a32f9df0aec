"""Prompts of the gateway's requests, by the model's own tokenizer; of several models during an upgrade."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from quire.cluster.gateway.tokenizing import Tokenizing
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import ConfigError
from quire.replicas.text.prompt import as_messages
from quire.replicas.text.tokenize import PromptTokenizer
from quire.replicas.text.tokenizer_files import open_tokenizer

_KEPT = 4
_BYTES_PER_TOKEN = 4
"""About what a token id costs to turn into text."""


class Prompts:
    """Safe to use from several tasks; the tokenizer is only read."""

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

    async def encode(self, text: str, most_tokens: int) -> list[int]:
        """The prompt that a text is. Raises InvalidRequest, also for too many tokens, and QueueFull."""
        self._tokenizer.check_length(len(text), most_tokens)
        return await self._tokenizing.run(
            len(text.encode()), lambda stopped: self._tokenizer.encode(text, most_tokens, stopped)
        )

    async def encode_chat(
        self, messages: Sequence[inference_pb2.ChatMessage], most_tokens: int, size_bytes: int
    ) -> list[int]:
        """The prompt of the assistant's next turn. Raises as `encode`. `size_bytes`: of all messages."""
        self._tokenizer.check_messages(len(messages), most_tokens)

        def encode(stopped: Callable[[], bool]) -> list[int]:
            turns = as_messages([{"role": one.role, "content": one.content} for one in messages])
            return self._tokenizer.encode_chat(turns, most_tokens, stopped)

        return await self._tokenizing.run(size_bytes, encode)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens. Raises QueueFull."""
        ids = list(token_ids)
        return await self._tokenizing.run(
            _BYTES_PER_TOKEN * len(ids), lambda stopped: self._tokenizer.decode(ids)
        )


class Tokenizers:
    """The prompts of every tokenizer there is among the replicas, each made once."""

    def __init__(self, tokenizing: Tokenizing | None = None) -> None:
        """`tokenizing`: where all of them do their work."""
        self._tokenizing = tokenizing or Tokenizing()
        self._prompts: OrderedDict[bytes, Prompts] = OrderedDict()
        self._making = asyncio.Lock()

    async def of(self, digest: bytes, fetch: Callable[[], Awaitable[Mapping[str, bytes]]]) -> Prompts:
        """`fetch` gives the files if the digest is new. Raises ConfigError, and what `fetch` raises."""
        async with self._making:
            if digest not in self._prompts:
                files = await fetch()
                self._prompts[digest] = await asyncio.to_thread(Prompts, files, self._tokenizing)
            self._prompts.move_to_end(digest)
            while len(self._prompts) > _KEPT:
                self._prompts.popitem(last=False)
            return self._prompts[digest]


def _write(folder: Path, path: str, content: bytes) -> None:
    target = (folder / path).resolve()
    if not target.is_relative_to(folder):
        raise ConfigError(f"a tokenizer's file is called {path!r}, which leads out of its folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
