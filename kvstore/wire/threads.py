"""How the store's threads share the cores with others, and with each other."""

from __future__ import annotations

import os
from contextlib import suppress


def use_batch_scheduling() -> None:
    """Stop this thread, and those that it starts, from preempting others when they wake up (SCHED_BATCH).

    Their share of time stays the same. The threads of a transfer wake each other for every chunk: with few
    cores, context switches would cost more than waiting (docs/lab/performance.md).
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        with suppress(OSError):  # not permitted: still correct, but slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
