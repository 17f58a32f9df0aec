"""What deploy/ holds, against those who will read it: Ray's schema and providers, Serve, ourselves."""

import json
import re
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE
from ray.serve.schema import ServeDeploySchema
from teardown import end_machines

from quire.cluster.config import ServeConfig, parse

DEPLOY = Path(__file__).parents[2] / "deploy"
CLUSTERS = sorted(DEPLOY.glob("ray/*.yaml"))
CLUSTERS = [path for path in CLUSTERS if "provider" in yaml.safe_load(path.read_text())]


def application(text: str) -> ServeConfig:
    """The one application of a Serve config file, parsed as `serve deploy` and then we would."""
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert app.import_path == "quire.cluster.app:build"
    return parse(app.args)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_ray_takes_the_cluster_files(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    worker = config["available_node_types"][
        {"local": "local.cluster.node"}.get(config["provider"]["type"], "gpu_worker")
    ]
    assert 1 <= worker["min_workers"] <= worker["max_workers"]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_clusters_start_with_the_token_that_their_files_bring(path):
    tree = yaml.safe_load(path.read_text())
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    environment = (DEPLOY / "ray/env.sh").read_text()
    assert "export RAY_AUTH_MODE=token" in environment
    assert any(
        "deploy/ray/env.sh" in command and "~/.bashrc" in command for command in tree["setup_commands"]
    )


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_what_the_cluster_files_mount_is_in_the_repository_or_made_by_make(path):
    for local in yaml.safe_load(path.read_text())["file_mounts"].values():
        assert local.startswith("~") or local == "dist" or (DEPLOY.parent / local).exists()


def test_all_three_set_nodes_up_in_the_same_way():
    trees = [yaml.safe_load(path.read_text()) for path in CLUSTERS]
    assert len(trees) == 3
    assert len({json.dumps([t["setup_commands"], t["file_mounts"]]) for t in trees}) == 1


def test_the_clusters_application_is_one():
    config = application((DEPLOY / "ray/serve.yaml").read_text())
    assert config.gateway.host == "0.0.0.0"


def test_the_rayservice_holds_an_application_and_workers_it_fits_on():
    (service,) = yaml.safe_load_all((DEPLOY / "kuberay/rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    config = application(service["spec"]["serveConfigV2"])
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.engine.tp * config.replicas.count <= gpus * workers["maxReplicas"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert config.gateway.port in {port["containerPort"] for port in head["ports"]}
    assert head["image"] == container["image"]


def kuberay(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((DEPLOY / f"kuberay/{name}.yaml").read_text())
    return tree


def pods() -> list[dict[str, Any]]:
    """The templates of the head and of the workers."""
    cluster = kuberay("rayservice")["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", ["networkpolicy", "podmonitor"])
def test_policies_and_monitors_select_the_head_and_the_workers(name):
    spec = kuberay(name)["spec"]
    labels = spec.get("podSelector", spec.get("selector"))["matchLabels"]
    assert all(labels.items() <= pod["metadata"]["labels"].items() for pod in pods())


def test_prometheus_may_reach_what_it_scrapes_and_clients_the_gateway():
    ports = [{p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]} for pod in pods()]
    (endpoint,) = kuberay("podmonitor")["spec"]["podMetricsEndpoints"]
    scraped = {of_pod[endpoint["port"]] for of_pod in ports}
    rules = kuberay("networkpolicy")["spec"]["ingress"]
    opened = {port["port"] for rule in rules for port in rule.get("ports", ())}
    assert scraped | {ports[0]["gateway"], ports[0]["dashboard"]} <= opened


def test_workers_keep_models_on_the_claim_and_run_on_tainted_gpu_nodes():
    spec = pods()[1]["spec"]
    (volume,), (container,) = spec["volumes"], spec["containers"]
    assert volume["persistentVolumeClaim"]["claimName"] == kuberay("weights")["metadata"]["name"]
    (mount,) = container["volumeMounts"]
    environment = {one["name"]: one for one in container["env"]}
    assert mount["name"] == volume["name"]
    assert environment["HF_HOME"]["value"] == mount["mountPath"]
    secret = environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret["optional"]
    assert f"create secret generic {secret['name']} " in (DEPLOY.parent / "docs/deploy.md").read_text()
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]


def test_the_image_installs_the_pinned_set_and_drops_root():
    lines = (DEPLOY / "docker/Dockerfile").read_text()
    assert re.search(r"pip install .*-c constraints.txt", lines)
    assert re.findall(r"^USER (\w+)", lines, re.MULTILINE)[-1] != "root"
    assert ":latest" not in lines


@pytest.fixture
def aws(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mocked")
    monkeypatch.setenv("HOME", "/nonexistent")
    with mock_aws():
        yield


def _instance_profile() -> str:
    iam = boto3.client("iam", region_name="us-west-2")
    arn: str = iam.create_instance_profile(InstanceProfileName="tests")["InstanceProfile"]["Arn"]
    return arn


def _bootstrapped(tmp_path, monkeypatch):
    """The AWS file after Ray has found subnets, made keys and security groups: as `ray up` does it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    tree = yaml.safe_load((DEPLOY / "ray/aws.yaml").read_text())
    # Ray would make a role for the head out of policies that the mock does not know.
    profile = {"Arn": _instance_profile()}
    tree["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] = profile
    config = prepare_config(tree)
    return AWSNodeProvider.bootstrap_config(config)


def test_the_aws_file_makes_the_machines_it_names_and_they_end(aws, tmp_path, monkeypatch):
    config = _bootstrapped(tmp_path, monkeypatch)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind, name in (("head", "head"), ("worker", "gpu_worker")):
        tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_NODE_STATUS: "up-to-date"}
        provider.create_node(config["available_node_types"][name]["node_config"], tags, 1)
    kinds = {}
    for node in provider.non_terminated_nodes({}):
        kinds[provider.node_tags(node)[TAG_RAY_NODE_KIND]] = provider._get_node(node)
    assert set(kinds) == {"head", "worker"}
    assert kinds["head"].instance_type == "m6i.xlarge"
    assert kinds["worker"].instance_type == "g6.12xlarge"
    assert kinds["worker"].image_id == "ami-00000000000000000"
    assert {t["Key"]: t["Value"] for t in kinds["worker"].tags}["ray-cluster-name"] == "quire"
    found = end_machines(provider, wait_s=10, poll_s=0.1)
    assert len(found) == 2
    assert all(one.gone for one in found)
    assert not provider.non_terminated_nodes({})
