from quire.cluster.cli.top import top_lines
from quire.protos.quire.v1 import inference_pb2


def _stats(*replicas):
    return inference_pb2.Stats(
        model=inference_pb2.Model(name="m"), gateway_open_requests=3, gateway_retries=1, replicas=replicas
    )


def _replica(name, **numbers):
    return inference_pb2.ReplicaStats(replica_id=name, pages_total=10, **numbers)


def test_rates_are_those_of_the_time_between():
    before = _stats(_replica("a", output_tokens=100, prompt_tokens=1000, step_seconds=5.0))
    now = _stats(
        _replica(
            "a",
            running=2,
            pages_used=5,
            output_tokens=300,
            prompt_tokens=1100,
            cached_tokens=300,
            host_tokens=60,
            remote_tokens=40,
            step_seconds=6.0,
            bytes_received=8_000_000,
            bytes_saved=6_000_000,
        )
    )
    lines = list(top_lines(before, now, 2.0))
    assert lines[0] == "m: 1 replicas, 3 requests open, 1 retried since the gateway's start"
    assert lines[1] == (
        "100 output tokens/s, 200 prompt tokens/s, 75% of them found (50% local, 15% host, 10% remote)"
    )
    assert lines[2] == "4.0 MB/s between replicas, 3.0 MB/s less than in bf16; 0 requests failed"
    assert lines[5].split() == ["a", "2", "0", "50%", "0%", "100", "200", "75%", "50%", "0", "0", "0"]
    assert len({len(line) for line in lines[4:]}) == 1


def test_a_new_replica_began_at_nothing_and_a_gone_one_is_left_out():
    lines = list(top_lines(_stats(_replica("old")), _stats(_replica("new", output_tokens=50)), 1.0))
    assert [line.split()[0] for line in lines[5:]] == ["new"]
    assert lines[5].split()[5] == "50"


def test_nothing_asked_is_no_hit_rate():
    lines = list(top_lines(_stats(_replica("a")), _stats(_replica("a")), 1.0))
    assert "- of them found" in lines[1]
