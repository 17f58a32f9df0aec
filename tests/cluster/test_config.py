import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from ray import cloudpickle
from ray.serve.schema import ServeDeploySchema

from quire.cluster.app import build, gpus_per_shard
from quire.cluster.autoscaling import AutoscalingConfig
from quire.cluster.config import ServeConfig, parse
from quire.replicas.errors import ConfigError

FILE = Path(__file__).parents[2] / "deploy" / "serve.yaml"


def test_a_tree_becomes_frozen_dataclasses_with_defaults():
    config = parse({"engine": {"model": "demo", "tp": 2, "pool": {"bytes": 1000}}, "gateway": {"port": 9}})
    assert (config.engine.tp, config.engine.pool.bytes, config.gateway.port) == (2, 1000, 9)
    assert config.gateway.host == "127.0.0.1"
    with pytest.raises(AttributeError):
        config.gateway.port = 10


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (
            {"engine": {"model": "demo"}, "gatway": {}},
            r"unknown key gatway; the configuration has .*prefill.*\. Did you mean gateway\?",
        ),
        (
            {"engine": {"model": "demo", "pool": {"byts": 1}}},
            r"engine\.pool\.byts; engine\.pool has .*host_bytes.*\. Did you mean bytes\?",
        ),
        ({"engine": {"model": "demo", "xyz": 1}}, r"unknown key engine\.xyz; engine has .*store$"),
        ({"engine": {"model": "demo", 7: 1}}, r"unknown key engine\.7"),
        (
            {"engine": {"model": "demo", "tp": "2"}},
            r"engine\.tp must be a whole number \(at least 1\), got '2'",
        ),
        ({"engine": {"model": "demo", "tp": True}}, r"engine\.tp must be a whole number .*, got True"),
        (
            {"engine": {"model": "demo", "pool": {"bytes": 1.5}}},
            r"pool\.bytes must be a whole number \(at least 1\) or null, got 1\.5",
        ),
        ({"engine": {"model": "demo", "device": "tpu"}}, r"engine\.device must be one of 'auto', 'cpu'"),
        ({"engine": {"model": "demo", "kv": 8}}, r"engine\.kv must be a text or a mapping, got 8"),
        ({"engine": {"model": "demo"}, "gateway": 5}, "gateway must be a mapping"),
        ({"engine": {}}, "engine lacks a key without a default: .*model"),
        ({}, "the configuration lacks .*engine"),
        (
            {"engine": {"model": "demo"}, "gateway": {"port": 70000}},
            r"gateway\.port .*at most 65535\), got 70000",
        ),
        (
            {"engine": {"model": "demo"}, "gateway": {"resources": {"a": 0}}},
            r"resources must be a mapping in which each value is a number \(above 0\), got \{'a': 0\}",
        ),
        (
            {"engine": {"model": "demo"}, "gateway": {"max_tokenizing_bytes": 1000}},
            r"gateway\.max_tokenizing_bytes=1000 would never take",
        ),
        (
            {"engine": {"model": "demo", "generation_defaults": True}},
            r"engine\.generation_defaults must be one of 'model', 'none'",
        ),
        ({"engine": {"model": "demo"}, "replicas": {"count": 0}}, r"replicas\.count .*\(at least 1\), got 0"),
        (
            {"engine": {"model": "demo", "pool": {"host_bytes": -1}}},
            r"pool\.host_bytes must be a whole number \(at least 0\), got -1",
        ),
        ({"engine": {"model": "demo", "scheduler": {"max_running": 0}}}, r"max_running must be .*least 1"),
    ],
)
def test_what_does_not_fit_is_named_in_full(tree, text):
    with pytest.raises(ConfigError, match=text):
        parse(tree)


def test_a_whole_number_is_a_number_too():
    assert parse({"engine": {"model": "demo", "shard_timeout_s": 3}}).engine.shard_timeout_s == 3


def test_a_policy_may_be_spelled_out_and_travels():
    policy = {"default": {"k": "int8", "v": "int4"}}
    config = parse({"engine": {"model": "demo", "kv": policy}})
    assert config.engine.kv == policy
    assert cloudpickle.loads(cloudpickle.dumps(config)) == config


def test_the_deployable_file_lists_every_option_with_its_default():
    text = FILE.read_text()
    args = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications[0].args
    assert parse(args) == parse({"engine": {"model": "demo"}})
    for path, default in _options(ServeConfig):
        node = args
        for key in path[:-1]:
            node = node[key]
        if default is None:
            assert re.search(f"# {path[-1]}:[ \n]", text), f"{'.'.join(path)} is not shown in {FILE.name}"
        else:
            assert path[-1] in node, f"{'.'.join(path)} is not listed in {FILE.name}"


def test_the_deployable_file_shows_every_knob_of_autoscaling_with_its_default():
    block = re.search(r"^ {8}# autoscaling:\n((?: {8}#   .*\n)+)", FILE.read_text(), re.MULTILINE)
    knobs = yaml.safe_load(re.sub(r"^ {8}#   ", "", block[1], flags=re.MULTILINE))
    assert set(knobs) == {field.name for field in fields(AutoscalingConfig)}
    config = parse({"engine": {"model": "demo"}, "replicas": {"autoscaling": knobs}})
    assert config.replicas.autoscaling == AutoscalingConfig(max=knobs["max"])


def test_autoscaling_takes_the_place_of_a_number():
    tree = {"engine": {"model": "demo"}, "replicas": {"autoscaling": {"max": 3}}}
    assert parse(tree).replicas.most == 3
    with pytest.raises(ConfigError, match=r"replicas\.autoscaling lacks a key without a default: .*max"):
        parse({**tree, "replicas": {"autoscaling": {"min": 0}}})
    with pytest.raises(ConfigError, match=r"unknown key replicas\.autoscaling\.maximum"):
        parse({**tree, "replicas": {"autoscaling": {"maximum": 3}}})
    with pytest.raises(ConfigError, match=r"replicas\.count=2 fixes what replicas\.autoscaling"):
        parse({**tree, "replicas": {"count": 2, "autoscaling": {"max": 3}}})
    assert parse({**tree, "replicas": {"autoscaling": None}}).replicas.most == 1


def test_autoscaling_reaches_serve_and_one_replica_at_most_shares_with_nobody():
    def deployed(**replicas):
        tree = {"engine": {"model": "demo"}, "replicas": replicas}
        gateway = build(tree)._bound_deployment
        (replica,) = [a for a in gateway.init_args if hasattr(a, "_bound_deployment")]
        return replica._bound_deployment

    scaled = deployed(autoscaling={"min": 2, "max": 5, "look_back_s": 7, "upscale_delay_s": 3})
    options = scaled._deployment_config.autoscaling_config
    assert (options.min_replicas, options.max_replicas, options.initial_replicas) == (2, 5, None)
    assert (options.look_back_period_s, options.upscale_delay_s) == (7, 3)
    assert options.policy.get_policy()(**options.policy.policy_kwargs)._config.min == 2
    assert scaled.init_args[0].store.share is True
    assert deployed(autoscaling={"min": 0, "max": 1}).init_args[0].store.share is False
    assert deployed(count=1).init_args[0].store.share is False
    assert deployed(count=2).init_args[0].store.share is True


@pytest.mark.parametrize(
    ("device", "configured", "cluster_gpus", "expected"),
    [
        ("auto", None, 4, 1),
        ("auto", None, 0, 0),
        ("cpu", None, 4, 0),
        ("auto", 0.5, 4, 0.5),
        ("auto", 0.0, 4, 0),
    ],
)
def test_shards_get_gpus_where_there_are_any(device, configured, cluster_gpus, expected):
    config = parse(
        {"engine": {"model": "demo", "device": device}, "replicas": {"gpus_per_shard": configured}}
    )
    assert gpus_per_shard(config, cluster_gpus) == expected


def test_the_deployable_file_builds_its_application():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    assert schema.applications[0].import_path == f"{build.__module__}:{build.__name__}"
    build(schema.applications[0].args)


def _options(kind, path=()):
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _options(hints[field.name], (*path, field.name))
        else:
            yield (*path, field.name), field.default


def test_a_new_secret_is_made_unless_one_is_given():
    first, second = (parse({"engine": {"model": "demo"}, "secret": s}) for s in (None, "x"))
    assert (first.secret, second.secret) == (None, "x")
