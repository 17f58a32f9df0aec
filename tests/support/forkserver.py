"""Processes of tests that have torch and the store imported when they begin."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = ["quire.replicas.engine.async_engine"]
"""By names that every Python of this environment can import: the fork server knows no folder of tests."""


def forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
