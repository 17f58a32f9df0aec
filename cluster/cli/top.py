"""The service at a glance, from two answers of its gateway. Pure: `client_commands.py` asks and draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quire.protos.quire.v1 import inference_pb2

_COLUMNS = (
    ("replica", "<12"), ("run", ">5"), ("wait", ">5"), ("pool", ">6"), ("cached", ">7"), ("out/s", ">7"),
    ("prompt/s", ">9"), ("hits", ">6"), ("busy", ">6"), ("preempt", ">8"), ("fetched", ">8"),
    ("failed", ">7"),
)  # fmt: skip
_SOURCES = ("local", "host", "remote")


def top_lines(before: inference_pb2.Stats, now: inference_pb2.Stats, seconds: float) -> Iterator[str]:
    """Yield the gauges of `now`, and the rates over the `seconds` between both; a new replica began at 0."""
    earlier = {replica.replica_id: replica for replica in before.replicas}
    pairs = [
        (earlier.get(replica.replica_id, inference_pb2.ReplicaStats()), replica) for replica in now.replicas
    ]
    yield (
        f"{now.model.name}: {len(pairs)} replicas, {now.gateway_open_requests} requests open, "
        f"{now.gateway_retries} retried since the gateway's start"
    )
    yield _tokens_line(pairs, seconds)
    yield _moved_line(pairs, seconds)
    yield ""
    yield " ".join(f"{title:{width}}" for title, width in _COLUMNS)
    for old, new in pairs:
        yield _row(old, new, seconds)


Pair = tuple[inference_pb2.ReplicaStats, inference_pb2.ReplicaStats]


def _tokens_line(pairs: Sequence[Pair], seconds: float) -> str:
    found = {
        source: sum(_found(new)[source] - _found(old)[source] for old, new in pairs) for source in _SOURCES
    }
    prompts = sum(found.values()) + _grown(pairs, "prompt_tokens")
    shares = ", ".join(f"{_share(tokens, prompts)} {source}" for source, tokens in found.items())
    return (
        f"{_grown(pairs, 'output_tokens') / seconds:,.0f} output tokens/s, "
        f"{prompts / seconds:,.0f} prompt tokens/s, "
        f"{_share(sum(found.values()), prompts)} of them found ({shares})"
    )


def _moved_line(pairs: Sequence[Pair], seconds: float) -> str:
    moved, saved = _grown(pairs, "bytes_received"), _grown(pairs, "bytes_saved")
    return (
        f"{moved / seconds / 1e6:,.1f} MB/s between replicas, "
        f"{saved / seconds / 1e6:,.1f} MB/s less than in bf16; "
        f"{_grown(pairs, 'requests_failed'):.0f} requests failed"
    )


def _row(old: inference_pb2.ReplicaStats, new: inference_pb2.ReplicaStats, seconds: float) -> str:
    pair = [(old, new)]
    cached = _grown(pair, "cached_tokens")
    prompts = cached + _grown(pair, "prompt_tokens")
    cells = (
        new.replica_id[:12],
        new.running,
        new.queued,
        _share(new.pages_used, new.pages_total),
        _share(new.pages_cached, new.pages_total),
        f"{_grown(pair, 'output_tokens') / seconds:,.0f}",
        f"{prompts / seconds:,.0f}",
        _share(cached, prompts),
        f"{_grown(pair, 'step_seconds') / seconds:.0%}",
        f"{_grown(pair, 'preemptions'):.0f}",
        f"{_grown(pair, 'fetched_blocks'):.0f}",
        f"{_grown(pair, 'failed_fetches'):.0f}",
    )
    return " ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def _found(stats: inference_pb2.ReplicaStats) -> dict[str, int]:
    local = stats.cached_tokens - stats.host_tokens - stats.remote_tokens
    return dict(zip(_SOURCES, (local, stats.host_tokens, stats.remote_tokens), strict=True))


def _grown(pairs: Sequence[Pair], name: str) -> float:
    return sum(float(getattr(new, name) - getattr(old, name)) for old, new in pairs)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"
