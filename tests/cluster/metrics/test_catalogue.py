import re
from dataclasses import fields, replace

from quire.cluster.metrics.catalogue import CATALOGUE
from quire.cluster.metrics.gateway_meter import Answered, GatewayNumbers
from quire.cluster.metrics.samples import format_name, gateway_samples, replica_samples
from quire.cluster.routing.replica_table import ReplicaTable
from quire.replicas.config import SchedulerConfig
from quire.replicas.engine.pressure import Pressure
from quire.replicas.metric import Kind, Origin, samples_of
from quire.replicas.request import ModelInfo
from quire.replicas.stats import EngineStats

INFO = ModelInfo(
    model="m",
    architecture="A",
    vocab_size=10,
    max_model_tokens=64,
    eos_token_ids=(),
    tp=1,
    page_tokens=16,
    kv_formats=(("int8", "int4"), ("int8", "int4")),
    bytes_per_token=100.0,
    bf16_bytes_per_token=256.0,
)
ANSWERED = Answered(
    first_token_s=0.25,
    inter_token_s=0.5,
    longest_pause_s=1.0,
    total_s=2.0,
    queue_s=0.125,
    prompt_tokens=7,
    output_tokens=3,
)


def _replica(**numbers):
    samples = replica_samples(EngineStats(**numbers), INFO, SchedulerConfig(), Pressure(), alive=True)
    return {(s.metric.name, *sorted(s.labels.values())): s.value for s in samples}


def _gateway(outcomes=None):
    numbers = GatewayNumbers(
        open_requests=1,
        max_open_requests=2,
        retries=3,
        replicas=4,
        outcomes=outcomes or {},
        routing=ReplicaTable().numbers(),
    )
    return list(gateway_samples(numbers))


def test_names_follow_prometheus_rules():
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert re.fullmatch(r"quire_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.buckets) == sorted(metric.buckets)
        if metric.unit in ("seconds", "bytes", "tokens"):
            assert metric.unit in metric.name


def test_every_metric_is_said_with_its_labels_by_the_process_it_names():
    said = {
        Origin.REPLICA: list(replica_samples(EngineStats(), INFO, SchedulerConfig(), Pressure(), alive=True)),
        Origin.GATEWAY: _gateway(),
    }
    observed = {sample.metric for sample in samples_of(ANSWERED)}
    for metric in CATALOGUE:
        if metric.kind is Kind.HISTOGRAM:
            assert metric in observed
            continue
        ours = [sample for sample in said[metric.origin] if sample.metric is metric]
        assert ours, metric.name
        for sample in ours:
            assert tuple(sample.labels) == metric.labels
        assert len({tuple(sample.labels.values()) for sample in ours}) == len(ours)


def test_every_counter_of_the_engine_is_shown():
    quiet = _replica()
    for field in fields(EngineStats):
        example = {"step_part_seconds": {"plan": 1.0}, "fetch_choices": {"fetch": 1}}
        causes = {"fetch_failures": {"checksum": 1}, "loan_failures": {"checksum": 1}}
        value = (example | causes).get(field.name, 1)
        assert _replica(**{field.name: value}) != quiet, field.name


def test_cached_tokens_are_split_by_where_they_were():
    said = _replica(prompt_tokens=5, local_tokens=60, remote_tokens=30, host_tokens=10)
    tokens = {key[1]: value for key, value in said.items() if key[0] == "quire_prompt_tokens_total"}
    assert tokens == {"computed": 5, "local": 60, "remote": 30, "host": 10}


def test_failures_that_have_not_happened_count_nothing_and_are_there():
    outcomes = {
        tuple(s.labels.values()): s.value for s in _gateway() if s.metric.name == "quire_requests_total"
    }
    assert outcomes["Generate", "UNAVAILABLE"] == outcomes["Chat", "OK"] == 0
    seen = _gateway(outcomes={("Chat", "OK"): 3, ("GetStats", "OK"): 2})
    outcomes = {tuple(s.labels.values()): s.value for s in seen if s.metric.name == "quire_requests_total"}
    assert (outcomes["Chat", "OK"], outcomes["GetStats", "OK"]) == (3, 2)
    assert _replica()["quire_fetch_failures_total", "checksum"] == 0


def test_a_format_has_one_short_name():
    assert format_name(INFO) == "int8/int4"
    assert format_name(replace(INFO, kv_formats=(("int8", "int8"),) * 3)) == "int8"
    assert format_name(replace(INFO, kv_formats=(("int8", "int8"), ("bf16", "bf16")))) == "mixed"
