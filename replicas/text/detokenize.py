"""Converts token ids to text as they arrive, in whole characters, ending before a stop text.

A token costs the same however long the output is.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from tokenizers import Tokenizer

_CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded too, to know whether a word begins with a space."""
_MAX_PENDING_TOKENS = 8
"""The most tokens inside one character; longer invalid bytes are shown as U+FFFD."""
_UNKNOWN = "\ufffd"


def special_tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    """Return the tokens that are not part of an output's text, and how each is written."""
    return {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}


class Detokenizer:
    """The text of one output: `push` tokens until one returns that a stop text was reached, then `finish`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: tuple[str, ...] = (),
        special: Container[int] | None = None,
    ) -> None:
        """Start an output. `special`: the tokenizer's `special_tokens`, if the caller has them."""
        self._tokenizer = tokenizer
        self._special = special = special_tokens(tokenizer) if special is None else special
        self._stop = stop
        self._held = ""  # text that may be the beginning of a stop text
        # Text depends on the tokens before: that of `_before` was emitted, that of `_pending` was not.
        self._before = [token for token in prompt[-_CONTEXT_TOKENS:] if token not in special]
        self._emitted = self._text(self._before)
        self._pending: list[int] = []

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Return the text that is now final, and whether a stop text was completed (text ends before it)."""
        text = self._held + self._decode(token)
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends and may_stop:
            self._held = ""
            return text[: min(ends)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return the text held back for a stop text; an incomplete character is dropped."""
        text, self._held = self._held, ""
        return text

    def _decode(self, token: int) -> str:
        """Return the text of all pending tokens, once they end with a whole character."""
        if token in self._special:
            return ""
        self._pending.append(token)
        text = self._text(self._before + self._pending)
        if text.endswith(_UNKNOWN) and len(self._pending) <= _MAX_PENDING_TOKENS:
            return ""
        emitted = self._emitted if text.startswith(self._emitted) else self._emitted.rstrip(_UNKNOWN)
        self._before, self._pending = self._pending, []
        self._emitted = self._text(self._before)
        return text[len(emitted) :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
