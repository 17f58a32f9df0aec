"""Time of device work: many calls in one CUDA graph, so that the host's launches do not show; and of whole
steps with the host's part in them, beside what the device alone took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_CALLS = 32
"""In one graph at least, if they are short."""
_SECONDS = 20e-3
"""Of one graph at most, if its calls are long."""
_CYCLES_PER_S = 2e9
"""At least what a multiprocessor counts."""


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


def wall_seconds(steps: Sequence[Callable[[], object]], rounds: int = 5) -> float:
    """Median over `rounds` of the mean seconds of one of `steps`, which follow each other without a pause:
    the slower of host and device. A first round warms up.
    """
    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for step in steps:
            step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / len(steps))
    return median(seconds[1:])


def device_seconds(steps: Sequence[Callable[[], object]], wall_s: float) -> float | None:
    """Mean seconds that the device needs for one of `steps` if the host never keeps it waiting.

    The device first sleeps while the host hands over all steps (`wall_s` each at most), then runs them back
    to back between two events. The first attempt may have to allocate host memory for them, so there are two.
    Where a step makes the host wait, the host cannot get ahead; then the device's activities in a trace are
    added up, which counts the pauses between kernels as idle. None where that does not work either.
    """
    return _slept_seconds(steps, wall_s) or _slept_seconds(steps, wall_s) or _traced_seconds(steps)


def _slept_seconds(steps: Sequence[Callable[[], object]], wall_s: float) -> float | None:
    """None where the device woke before the host had handed it all steps."""
    awake, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(round(2 * wall_s * len(steps) * _CYCLES_PER_S))
    awake.record()
    for step in steps:
        step()
    host_was_ahead = not awake.query()
    done.record()
    torch.cuda.synchronize()
    milliseconds: float = awake.elapsed_time(done)
    return milliseconds / 1e3 / len(steps) if host_was_ahead else None


def _traced_seconds(steps: Sequence[Callable[[], object]]) -> float | None:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for step in steps:
            step()
        torch.cuda.synchronize()
    spans = [
        (e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == DeviceType.CUDA
    ]
    return covered(spans) / 1e6 / len(steps) if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, some of which overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _elapsed(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
