"""What ends an output before max_tokens: the model's end tokens, and the request's own tokens and texts.

Knows nothing of sequences; `detokenize.py` finds the stop texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quire.replicas.errors import InvalidRequest
from quire.replicas.request import SamplingParams


class StopRules:
    """Which tokens end an output of a model; a stop text that is a special token is among them."""

    def __init__(self, end_tokens: Iterable[int], special: Mapping[int, str]) -> None:
        """Take the model's own end tokens, and the tokenizer's special tokens."""
        self._end_tokens = frozenset(end_tokens)
        self._special = {text: token for token, text in special.items()}

    def check(self, sampling: SamplingParams) -> None:
        """Raise InvalidRequest for a stop text that can never occur in an output's text."""
        for stop in sampling.stop:
            within = [text for text in self._special if text in stop]
            if within and stop not in self._special:
                raise InvalidRequest(
                    f"stop text {stop!r} contains the special token {within[0]!r}, which is not part of an "
                    "output's text; give that token alone, or leave it out"
                )

    def end_tokens(self, sampling: SamplingParams) -> frozenset[int]:
        """Return the tokens that end an output of this request, once it has min_tokens."""
        texts = {self._special[stop] for stop in sampling.stop if stop in self._special}
        own = frozenset() if sampling.ignore_eos else self._end_tokens
        return own.union(texts, sampling.stop_token_ids)
