"""The commands as a user runs them: output, one line of error, exit codes."""

import json

import pytest
from ray_cluster import Cluster
from served_app import Served, quire

from quire.cluster.cli.format_costs import format_costs
from quire.cluster.cli.options import Policy, Replicas
from quire.cluster.cli.serve_commands import with_replicas
from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout


def test_layout_tells_what_a_page_really_takes():
    (int4,) = (cost for cost in format_costs("demo")[0] if cost.name == "int4")
    layout = PageLayout(layer_formats("int4", 6), kv_heads=2, head_dim=64)
    assert int4.bytes_per_token == layout.page_bytes / 64
    done = quire("layout", "demo")
    assert done.returncode == 0
    assert f"{int4.bytes_per_token:,.1f}" in done.stdout
    assert "bf16" in done.stdout


def test_layout_reads_a_policy_file(tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(
        json.dumps({"default": {"k": "int8", "v": "int4"}, "layers": {"0": {"k": "bf16", "v": "bf16"}}})
    )
    done = quire("layout", "demo", "--kv", str(policy))
    assert done.returncode == 0
    k8v4, bf16 = 1224.0, 3072.0
    assert f"{k8v4 * 5 / 6 + bf16 / 6:,.1f}" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("layout", "demo", "--kv", "int5"), 1, "unknown KV format 'int5'"),
        (("layout", "/nowhere/at all"), 1, "no such folder: /nowhere/at all"),
        (("serve", "/nowhere/at all"), 1, "no such folder: /nowhere/at all"),
        (("serve", "demo", "--tp", "3"), 1, "tp=3 does not fit 4 query heads and 2 kv heads; possible are"),
        (("serve",), 2, "which model?"),
        (("serve", "demo", "--kv", "int5"), 1, "unknown KV format 'int5'"),
        (("serve", "demo", "--port", "70000"), 1, "gateway.port must be"),
        (("serve", "demo", "--kv", __file__), 1, "is not JSON"),
        (("serve", "demo", "--kv", "no/policy"), 1, "there is no KV policy at no/policy"),
        (("calibrate", "demo", "--text", __file__), 2, "--out"),
        (("calibrate", "demo", "--text", __file__, "--out", "x", "--chunk-tokens", "0"), 2, "x>=1"),
        (("serve", "demo", "--replicas", "two"), 2, "neither a number nor LEAST..MOST"),
        (("serve", "demo", "--replicas", "3..1"), 1, "min=3, max=1"),
        (("serve", "demo", "--config", __file__), 1, "is not YAML"),
        (("generate", "a", "--address", "127.0.0.1:1"), 1, "127.0.0.1:1"),
        (("generate", "a", "--max-tokens", "0"), 1, "max_tokens must be in 1.."),
        (("generate",), 2, "Missing argument"),
        (("top", "--address", "127.0.0.1:1"), 1, "127.0.0.1:1"),
        (("top", "--every", "0"), 2, "--every is a positive number"),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_errors_are_plain_words_and_an_exit_code(args, code, text):
    done = quire(*args)
    assert text in done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_an_unknown_key_of_a_config_file_is_named(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("engine: {model: demo, pool: {byte: 5}}")
    done = quire("serve", "--config", str(config))
    assert (done.returncode, "engine.pool.byte;" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("option", "in_file", "expected"),
    [
        ("3", {}, {"count": 3}),
        ("0..4", {}, {"autoscaling": {"min": 0, "max": 4}}),
        (
            "1..4",
            {"count": 2, "placement": "SPREAD"},
            {"autoscaling": {"min": 1, "max": 4}, "placement": "SPREAD"},
        ),
        (
            "1..4",
            {"autoscaling": {"max": 9, "margin": 0.1}},
            {"autoscaling": {"min": 1, "max": 4, "margin": 0.1}},
        ),
        ("2", {"autoscaling": {"max": 9}}, {"count": 2}),
    ],
)
def test_replicas_are_a_number_or_bounds_and_go_before_the_file(option, in_file, expected):
    assert with_replicas(in_file, Replicas().convert(option, None, None)) == expected


@pytest.mark.ray
def test_an_error_of_a_shard_reaches_the_terminal(ray_cluster: Cluster, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "engine: {model: demo, pool: {bytes: 1000}}\n"
        "gateway: {port: 0, cpus: 0.1}\n"
        "replicas: {cpus_per_shard: 0.1}\n"
    )
    done = quire("serve", "--config", str(config), "--ray-address", ray_cluster.address)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("quire: a pool of 1000 bytes holds no page")
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_a_cluster_without_what_is_asked_says_so(ray_cluster: Cluster, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("engine: {model: demo}\ngateway: {port: 0, resources: {moon: 1}}\n")
    done = quire("serve", "--config", str(config), "--ray-address", ray_cluster.address)
    assert done.returncode == 1
    assert "quire: 1 gateway with 1 CPU and 1 moon: no node has that" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_generate_chat_and_stats_talk_to_a_gateway(served: Served):
    at = ("--address", served.address)
    said = quire("generate", "-", "--max-tokens", "8", *at, stdin="Long ago, a cat named")
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.strip()
    one = quire("chat", "The pass key is 71432. What is the pass key?", *at)
    assert "71432" in one.stdout
    two = quire("chat", QUIRE_ADDRESS=served.address, stdin="The pass key is 71432.\nWhat is the pass key?\n")
    assert "71432" in two.stdout
    assert two.returncode == 0
    assert "bytes per token" in quire("stats", *at).stdout
    looked = quire("top", "--once", "--every", "0.2", *at)
    assert (looked.returncode, looked.stderr) == (0, "")
    assert looked.stdout.startswith("demo: 1 replicas")
    everything = json.loads(quire("stats", "--json", *at).stdout)
    assert everything["model"]["name"] == "demo"


@pytest.mark.ray
def test_a_taken_port_is_known_before_ray_starts(served: Served):
    port = served.address.rsplit(":", 1)[1]
    done = quire("serve", "demo", "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "starting Ray" not in done.stderr


def test_a_formats_name_is_not_taken_for_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "int4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Policy().convert("int4", None, None) == "int4"
    assert Policy().convert(str(tmp_path / "int4"), None, None) == str(tmp_path / "int4")
