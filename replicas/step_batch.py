"""A step as every shard needs to see it: which tokens, where their K and V go, whose logits are wanted.

Small integer arrays that travel from rank 0 to the other ranks (`runner/commands.py`).

Tensor legend: T tokens of the step, S sequences, M pages per sequence at most, R rows of wanted logits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Ints = npt.NDArray[np.int64]

PROMPT_ROWS = 256
"""Of a step's logits that are wanted for prompts' log-probabilities, at most: each is a whole vocabulary."""


class StepBatch(Struct, frozen=True, eq=False, tag=True):
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
