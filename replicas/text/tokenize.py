"""Tokenizes texts and chats into prompts, and detokenizes: the same offline and served.

A prompt begins with the tokens that the tokenizer puts before a text (once), and never ends with those it
puts after one. A text that is too long is refused before all of it is tokenized: by its length where that
suffices, else as soon as its first slices have too many tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from quire.replicas.errors import InvalidRequest
from quire.replicas.text.prompt import ChatMessage
from quire.replicas.values import text as checked_text

_SLICE_CHARACTERS = 16_384
_SLACK_TOKENS = 64
"""The most tokens that cutting a text at both ends of a slice is assumed to add."""
_WHOLE_TEXT_CHARACTERS = 8
"""Texts of at most this many characters per servable token are tokenized in one piece: at most twice the work
of the longest prompt."""


class Stopped(Exception):
    """Tokenizing ended because the tokens are not needed any more."""


class PromptTokenizer:
    """A model's tokenizer; it is never modified, and may be used from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        """Wrap a fast tokenizer of transformers."""
        self._chat = tokenizer
        # A copy: a caller that sets its tokenizer to truncate, for instance, must not change prompts.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._prefix = _prefix_tokens(self._backend)
        self._longest = _longest_token(self._backend)

    def check_length(self, characters: int, most_tokens: int) -> None:
        """Raise InvalidRequest if no text of this many characters has as few tokens."""
        if self._longest is not None and characters > self._longest * most_tokens:
            raise _overlong(characters, most_tokens)

    def check_messages(self, messages: int, most_tokens: int) -> None:
        """Raise InvalidRequest if no chat of this many messages can be a prompt."""
        if not self._chat.chat_template:
            raise InvalidRequest("this model has no chat template; give a prompt of your own to generate")
        if messages == 0:
            raise InvalidRequest("the chat has no messages; send at least one")
        if messages > most_tokens:
            raise InvalidRequest(
                f"the chat has {messages} messages; this model serves {most_tokens} tokens of prompt and "
                "output together. Send fewer"
            )

    def encode(self, text: str, most_tokens: int, stopped: Callable[[], bool] = lambda: False) -> list[int]:
        """Tokenize a text after the tokens that the tokenizer puts first, unless the text has them already.

        `stopped` is called now and then. Raises Stopped, and InvalidRequest for more than `most_tokens`.
        """
        ids = self._tokens(text, most_tokens, stopped)
        front = self._prefix
        there = next(n for n in range(len(front), -1, -1) if ids[:n] == front[len(front) - n :])
        return _at_most(front[: len(front) - there] + ids, most_tokens)

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        most_tokens: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[int]:
        """Tokenize the prompt of the assistant's next turn, which the template renders completely.

        Raises as `encode`, and InvalidRequest if the template refuses the chat.
        """
        self.check_messages(len(messages), most_tokens)
        return _at_most(self._tokens(self._rendered(messages), most_tokens, stopped), most_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Detokenize, without special tokens."""
        return str(self._chat.decode(token_ids, skip_special_tokens=True))

    def _rendered(self, messages: Sequence[ChatMessage]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = self._chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except _TEMPLATE_ERRORS as error:
            said = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS]
            raise InvalidRequest(f"the model's chat template refuses these messages: {said}") from error
        return str(rendered)

    def _tokens(self, text: str, most_tokens: int, stopped: Callable[[], bool]) -> list[int]:
        self.check_length(len(text), most_tokens)
        checked_text("the prompt", text)
        if len(text) > _WHOLE_TEXT_CHARACTERS * most_tokens:
            self._refuse_overlong(text, most_tokens, stopped)
        if stopped():
            raise Stopped
        return self._encoded(text)

    def _refuse_overlong(self, text: str, most_tokens: int, stopped: Callable[[], bool]) -> None:
        """Count the tokens of one slice after the other, less what cutting may have added.

        What a tokenizer drops or joins within a slice it also does within the whole text.
        """
        tokens = 0
        for piece in _slices(text):
            if stopped():
                raise Stopped
            tokens += max(len(self._encoded(piece)) - _SLACK_TOKENS, 0)
            if tokens > most_tokens:
                raise _overlong(len(text), most_tokens)

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


_MAX_ERROR_CHARACTERS = 500
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
"""Errors of chat templates, which are programs that come with the model."""


def _overlong(characters: int, most_tokens: int) -> InvalidRequest:
    return InvalidRequest(
        f"the prompt's {characters} characters are more than {most_tokens} tokens, which is what this model "
        "serves of prompt and output together. Shorten the prompt or raise max_model_tokens"
    )


def _at_most(ids: list[int], most_tokens: int) -> list[int]:
    if len(ids) > most_tokens:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens; this model serves {most_tokens} of prompt and output "
            "together. Shorten the prompt or raise max_model_tokens"
        )
    return ids


def _slices(text: str) -> Iterator[str]:
    """Cut a text, before a nearby space if possible: most tokenizers cut there too."""
    at = 0
    while at < len(text):
        end = at + _SLICE_CHARACTERS
        if end < len(text) and (space := text.rfind(" ", at + _SLICE_CHARACTERS // 2, end)) > 0:
            end = space
        yield text[at:end]
        at = end


def _prefix_tokens(backend: Tokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    probe = "a"
    alone: list[int] = backend.encode(probe, add_special_tokens=False).ids
    ids: list[int] = backend.encode(probe).ids
    at = next((i for i in range(len(ids)) if ids[i : i + len(alone)] == alone), 0)
    return ids[:at]


def _longest_token(backend: Tokenizer) -> int | None:
    """Return the most bytes of a token, or None where a token may have any number of them.

    That is so where the tokenizer drops or joins characters first, where what is not in its vocabulary
    becomes one unknown token, and where a token includes the spaces beside it.
    """
    spec, vocabulary = json.loads(backend.to_str()), backend.get_vocab(with_added_tokens=True)
    if not (_is_lossless(spec) and _covers_all_bytes(spec, vocabulary)):
        return None
    return max(len(token.encode()) for token in vocabulary)


def _is_lossless(spec: dict[str, Any]) -> bool:
    kept = {"Prepend", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation"}
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in _steps(spec[part])]
    return (
        all(step["type"] in kept or _replaces_spaces(step) for step in steps)
        and all(step.get("behavior") != "Removed" for step in steps)
        and not any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"])
    )


def _covers_all_bytes(spec: dict[str, Any], vocabulary: Collection[str]) -> bool:
    """Tell whether there is a token for every byte."""
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in _steps(spec[part])]
    if any(step["type"] == "ByteLevel" for step in steps):
        bytes_known = sum(len(token) == 1 for token in vocabulary) >= 256
    else:
        bytes_known = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return spec["model"]["type"] == "BPE" and bytes_known


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Flatten the steps of a normalizer or a pre-tokenizer."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [one for step in inner for one in _steps(step)] if inner else [part]


def _replaces_spaces(step: dict[str, Any]) -> bool:
    """Tell whether a step replaces spaces by SentencePiece's character, which has more bytes."""
    return (step["type"], step.get("pattern"), step.get("content")) == ("Replace", {"String": " "}, "▁")
