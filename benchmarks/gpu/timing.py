"""Time of device work: many calls in one CUDA graph, so that the host's launches do not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

_CALLS = 32
"""In one graph at least, if they are short."""
_SECONDS = 20e-3
"""Of one graph at most, if its calls are long."""


def graph_seconds(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median seconds of one of `calls`, which run one after the other and should touch different data.

    Short calls go round many times, or the graph's own launch (some microseconds) would count as theirs. The
    first calls, outside the graph, compile and warm up.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    rounds = max(1, min(_CALLS // len(calls), int(_SECONDS / _elapsed(calls[0]))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    graph.replay()
    seconds = [_elapsed(graph.replay) for _ in range(replays)]
    graph.reset()
    return median(seconds) / (rounds * len(calls))


def call_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of `call` without a graph: for long ones, and for what a graph cannot hold."""
    call()
    torch.cuda.synchronize()
    return median(_elapsed(call) for _ in range(repeats))


def _elapsed(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
