"""How the store's own threads share the cores with everybody else, and with each other."""

from __future__ import annotations

import os
from contextlib import suppress


def use_batch_scheduling() -> None:
    """From now on this thread, and those that it starts, interrupt nobody when they wake up (SCHED_BATCH).

    Their share of time stays the same. The threads of a transfer wake each other for every piece of it: where
    there are few cores, the switches cost more than waiting for one's turn (docs/lab/performance.md).
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        with suppress(OSError):  # not allowed: all is right, and slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
