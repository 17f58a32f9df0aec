"""A step as every shard needs to see it: which tokens, where their K and V go, whose logits are wanted.

Small integer arrays that travel from rank 0 to the other ranks as bytes, without pickle.

Tensor legend: T tokens of the step, S sequences, M pages per sequence at most, R rows of wanted logits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

PROMPT_ROWS = 256
"""Of a step's logits that are wanted for prompts' log-probabilities, at most: each is a whole vocabulary."""


@dataclass(frozen=True, eq=False, slots=True)
class StepBatch:
    """All sequences' new tokens, one after the other."""

    token_ids_T: Ints
    """Negative where the token is not known here yet: -1 is the first that the step before drew."""
    positions_T: Ints
    slots_T: Ints
    """page * page_tokens + token within the page."""
    query_start_S1: Ints
    kv_tokens_S: Ints
    page_table_SM: Ints
    logit_rows_R: Ints
    """Tokens of the step (0..T-1) whose logits are wanted."""

    def to_bytes(self) -> bytes:
        """[lengths of the 7 arrays, M] and then the arrays, all little-endian int64."""
        arrays = [getattr(self, f.name) for f in fields(self)]
        header = np.array([a.size for a in arrays] + [self.page_table_SM.shape[1]], dtype="<i8")
        return b"".join([header.tobytes(), *(np.ascontiguousarray(a, dtype="<i8").tobytes() for a in arrays)])

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> StepBatch:
        """The inverse of `to_bytes`; trailing bytes are ignored."""
        words = np.frombuffer(data, dtype="<i8", count=len(data) // 8)
        sizes, width = words[:7], int(words[7])
        ends = 8 + np.cumsum(sizes)
        parts = [words[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        parts[5] = parts[5].reshape(-1, width)
        return StepBatch(*parts)
