"""An executor that overlaps steps as one on a GPU does, where there is none."""

from __future__ import annotations

import torch

from quire.replicas.runner.executor import Executor
from quire.replicas.step_batch import StepBatch


class Overlapping:
    """What an executor on a GPU promises: `run` comes back early, and tokens are handed on by their place.

    The step is computed at once all the same; that nobody reads results before their time shows in `drawn`.
    """

    overlaps = True

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.handed_on = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._executor, name)

    def run(self, batch: StepBatch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        self.handed_on += int((batch.token_ids_T < 0).sum())
        return self._executor.run(batch, drawn)
