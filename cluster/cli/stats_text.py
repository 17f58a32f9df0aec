"""The statistics of a gateway as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from quire.protos.quire.v1 import inference_pb2


def stats_lines(stats: inference_pb2.Stats) -> Iterator[str]:
    """Yield a few lines for the model and the gateway, then a few for each replica."""
    model = stats.model
    formats = Counter((layer.k, layer.v) for layer in model.kv_formats)
    stored = ", ".join(f"{layers} layers K {k} V {v}" for (k, v), layers in formats.items())
    share = model.bytes_per_token / model.bf16_bytes_per_token
    yield (
        f"model      {model.name} ({model.architecture}), {model.tp} shards, "
        f"up to {model.max_model_tokens} tokens"
    )
    says = model.sampling
    yield (
        f"defaults   temperature {says.temperature:g}, top_k {says.top_k}, top_p {says.top_p:g}, "
        f"min_p {says.min_p:g}, repetition_penalty {says.repetition_penalty:g}"
    )
    yield f"KV cache   {stored}"
    yield (
        f"           {model.bytes_per_token:,.0f} bytes per token, bf16 {model.bf16_bytes_per_token:,.0f}: "
        f"{1 / share:.2f} times as many tokens in the same memory"
    )
    yield f"gateway    {stats.gateway_open_requests} requests open, {stats.gateway_retries} retried"
    upgrade = len({replica.fingerprint for replica in stats.replicas}) > 1
    for replica in stats.replicas:
        yield from _replica_lines(replica)
        if upgrade:
            yield f"  model    {replica.fingerprint[:12]}, and others serve another"


def _replica_lines(replica: inference_pb2.ReplicaStats) -> Iterator[str]:
    yield (
        f"replica    {replica.replica_id}: {replica.running} running, {replica.queued} queued, "
        f"{replica.requests_finished} finished, {replica.requests_cancelled} cancelled, "
        f"{replica.requests_failed} failed"
    )
    yield (
        f"  pages    {replica.pages_total}: {replica.pages_used} used, {replica.pages_cached} cached, "
        f"{replica.pages_free} free"
    )
    prompts = replica.prompt_tokens + replica.cached_tokens
    hit = replica.cached_tokens / prompts if prompts else 0.0
    yield (
        f"  tokens   {prompts} of prompts, {replica.cached_tokens} of them from the cache ({hit:.0%}); "
        f"{replica.output_tokens} of outputs"
    )
    if replica.fetched_blocks or replica.bytes_sent:
        yield (
            f"  shared   {replica.fetched_blocks} blocks fetched ({replica.failed_fetches} fetches failed), "
            f"{replica.bytes_received / 1e6:,.1f} MB received, {replica.bytes_sent / 1e6:,.1f} MB sent, "
            f"{replica.bytes_saved / 1e6:,.1f} MB less than in bf16"
        )
    yield (
        f"  speed    {replica.output_tokens_per_s:.0f} output tokens per second in {replica.steps} steps, "
        f"{replica.step_seconds:.1f} s of them"
    )
