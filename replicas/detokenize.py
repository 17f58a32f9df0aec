"""Token ids to text, as they arrive: whole characters only, ending before a stop text.

One object per output. The characters themselves are pieced together by `tokenizers`' DecodeStream.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT_TOKENS = 6
"""Tokens of the prompt the decoder sees first: enough to know whether a word begins with a space."""


class Detokenizer:
    """Text of one output. `push` tokens until it says that a stop text was reached, then `finish`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        context = list(prompt[-_CONTEXT_TOKENS:])
        if tokenizer.decode(context).endswith("\ufffd"):  # the prompt ends inside a character
            context = []
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._stop = stop
        self._held = ""  # text that may be the beginning of a stop text

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

    def _decode(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # tokenizers has nothing narrower for byte tokens that form no text
            self._stream = DecodeStream(skip_special_tokens=True)
            return "\ufffd" + (self._stream.step(self._tokenizer, token) or "")

    def finish(self) -> str:
        """What was held back, once no stop text can follow. An incomplete character stays unsaid."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
