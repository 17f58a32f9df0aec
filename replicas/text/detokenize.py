"""Token ids to text, as they arrive: whole characters only, ending before a stop text.

One object per output; a token costs the same however long the output is.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from tokenizers import Tokenizer

_CONTEXT_TOKENS = 6
"""Tokens of the prompt the decoder sees first: enough to know whether a word begins with a space."""
_MAX_PENDING_TOKENS = 8
"""Tokens that may be inside one character. After more, the bytes form no text and are shown as U+FFFD."""
_UNKNOWN = "\ufffd"


def special_tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    """The tokens that are not part of an output's text, and how each is written."""
    return {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}


class Detokenizer:
    """Text of one output. `push` tokens until it says that a stop text was reached, then `finish`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: tuple[str, ...] = (),
        special: Container[int] | None = None,
    ) -> None:
        """`special`: the tokenizer's `special_tokens`, for a caller that has them at hand."""
        self._tokenizer = tokenizer
        self._special = special = special_tokens(tokenizer) if special is None else special
        self._stop = stop
        self._held = ""  # text that may be the beginning of a stop text
        # A decoder's text depends on the tokens before: `_before`'s text was passed on, `_pending`'s was not.
        self._before = [token for token in prompt[-_CONTEXT_TOKENS:] if token not in special]
        self._said = self._text(self._before)
        self._pending: list[int] = []

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop text was completed (the text ends before it)."""
        text = self._held + self._decode(token)
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends and may_stop:
            self._held = ""
            return text[: min(ends)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back, once no stop text can follow. An incomplete character stays unsaid."""
        text, self._held = self._held, ""
        return text

    def _decode(self, token: int) -> str:
        """The text of all pending tokens, once they end with a whole character."""
        if token in self._special:
            return ""
        self._pending.append(token)
        text = self._text(self._before + self._pending)
        if text.endswith(_UNKNOWN) and len(self._pending) <= _MAX_PENDING_TOKENS:
            return ""
        said = self._said if text.startswith(self._said) else self._said.rstrip(_UNKNOWN)
        self._before, self._pending = self._pending, []
        self._said = self._text(self._before)
        return text[len(said) :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
