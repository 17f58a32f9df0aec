"""The commands that serve: `quire serve`, `deploy`, `gateways`, `layout` and `demo`.

Each command imports what it needs beyond the client, so that `quire --help` works in every installation.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cluster.cli.interrupts import Interrupts
from quire.cluster.cli.options import APP, FILE, Replicas, cluster_options, kv_option
from quire.cluster.cli.progress import Progress, standard_error
from quire.replicas.errors import ConfigError

if TYPE_CHECKING:
    from quire.cluster.config import ServeConfig


@click.command("serve")
@click.argument("model", required=False)
@click.option("--config", "config_file", type=FILE, help="YAML file; the options below go before it.")
@kv_option
@click.option("--tp", type=int, help="Tensor-parallel shards of a replica.")
@click.option("--replicas", type=Replicas(), help="Whole engines: a number, or LEAST..MOST as the load asks.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0: any free one.  [default: 8100]")
@click.option("--metrics-port", type=int, help="Port for Prometheus, on 127.0.0.1.  [default: any free one]")
@click.option(
    "--ray-address", envvar="RAY_ADDRESS", help="A running Ray cluster (RAY_ADDRESS); none: our own."
)
def serve_command(
    model: str | None,
    config_file: Path | None,
    kv: str | dict[str, object] | None,
    tp: int | None,
    replicas: dict[str, Any] | None,
    host: str | None,
    port: int | None,
    metrics_port: int | None,
    ray_address: str | None,
) -> None:
    """Serve MODEL (a folder, a Hugging Face id, or "demo") until interrupted.

    Gated models of the hub need HF_TOKEN, a token that may read them.
    """
    from quire.cluster.config import parse

    tree = _read_tree(config_file)
    chosen: dict[str, dict[str, Any]] = {
        "engine": {"model": model, "kv": kv, "tp": tp},
        "gateway": {"host": host, "port": port},
    }
    for branch, values in chosen.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            tree[branch] = {**(tree.get(branch) or {}), **given}
    if replicas:
        tree["replicas"] = with_replicas(tree.get("replicas") or {}, replicas)
    if "model" not in (tree.get("engine") or {}):
        raise click.UsageError(
            'which model? Give a folder, a Hugging Face id or "demo", or a --config that does'
        )
    config = parse(tree)
    if ray_address and metrics_port is not None:
        raise click.UsageError("--metrics-port is for a Ray of our own; a running cluster has ports already")
    with _running(config, ray_address, metrics_port) as (_, progress):
        progress.say(f"serving {config.engine.model} at {_gateways(APP)}; Ctrl-C ends it")
        if ray_address is None:
            progress.say(f"metrics for Prometheus at {_metrics_address()}")
        signal.pause()


@click.command()
@click.argument("config_file", type=FILE)
@cluster_options
def deploy(config_file: Path, ray_address: str, app: str) -> None:
    """Roll CONFIG_FILE out on a running Ray cluster: what has changed is replaced, and nothing else.

    CONFIG_FILE: as for `quire serve --config`, or as for `serve deploy`. The application stays up afterwards,
    until `serve delete` takes it down.
    """
    from quire.cluster.cli import preflight
    from quire.cluster.config import parse

    config = preflight.located(parse(_arguments(_read_tree(config_file), app)))
    with Progress(standard_error()) as progress:
        progress("checking the configuration")
        preflight.check(config, here=False)
        from quire.cluster.cli.ray_session import cluster
        from quire.cluster.cli.rollout import rolled_out

        progress("connecting to Ray")
        with cluster(config, ray_address):
            rolled_out(config, app, progress)
            progress.say(f"serving {config.engine.model} at {_gateways(app)}")


@click.command()
@cluster_options
def gateways(ray_address: str, app: str) -> None:
    """Addresses of the application's gateways, with commas: `QUIRE_ADDRESS=$(quire gateways)`."""
    from quire.cluster.cli.ray_session import connected

    with connected(ray_address):
        found = _gateways(app)
    if not found:
        raise ConfigError(f"no gateway of application {app!r} is up; `serve status` says more")
    click.echo(found)


def _gateways(app: str) -> str:
    from quire.cluster.gateway_registry import addresses

    return ",".join(addresses(app))


def _metrics_address() -> str:
    from quire.cluster.cli.ray_session import metrics_address

    return metrics_address()


def _arguments(tree: dict[str, Any], app: str) -> dict[str, Any]:
    """Quire's own part of a Serve config file; the whole of any other."""
    if "applications" not in tree:
        return tree
    for one in tree["applications"]:
        if one.get("name") == app:
            return dict(one.get("args") or {})
    raise ConfigError(f"the file has no application {app!r}; give its name with --app")


@click.command()
@click.argument("model")
@kv_option
@click.option("--page-tokens", default=64, show_default=True, help="16, 32 or 64.")
def layout(model: str, kv: str | dict[str, object] | None, page_tokens: int) -> None:
    """Show what a token of MODEL costs in each KV format that can be served; reads only its config.json."""
    from quire.cluster.cli.format_costs import format_costs, policy_cost

    misfits: dict[str, str] = {}
    if kv:
        name = kv if isinstance(kv, str) else "policy"
        costs = [policy_cost(model, kv, name=name, page_tokens=page_tokens)]
    else:
        costs, misfits = format_costs(model, page_tokens)
    click.echo(f"{'format':<12}{'bytes per token':>16}{'of bf16':>10}{'tokens in the memory of one':>30}")
    for cost in costs:
        more = 1 / cost.share_of_bf16
        click.echo(f"{cost.name:<12}{cost.bytes_per_token:>16,.1f}{cost.share_of_bf16:>10.3f}{more:>29.2f}x")
    for name, reason in misfits.items():
        click.echo(f"{name:<12}not for this model: {reason}")


@click.command()
@click.option("--kv", default="int4", show_default=True, help="KV format.")
@click.option("--tp", default=2, show_default=True, help="Tensor-parallel shards.")
def demo(kv: str, tp: int) -> None:
    """Serve a small model and let it find a fact far back in a chat; leaves nothing running."""
    from quire.cluster.cli.demo import demo_config, run_demo

    with _running(demo_config(kv, tp), None) as (port, progress):
        progress.say("")
        run_demo(f"127.0.0.1:{port}", click.echo, partial(click.echo, nl=False))


@contextmanager
def _running(
    config: ServeConfig, ray_address: str | None, metrics_port: int | None = None
) -> Iterator[tuple[int, Progress]]:
    """The application, up; gives the gateway's port. Ctrl-C and SIGTERM both take it down in order."""
    with Progress(standard_error()) as progress:
        interrupts = Interrupts(progress.say)
        progress("checking the model")
        from quire.cluster.cli import preflight  # from here on, imports take seconds

        config = preflight.located(config)
        if config.engine.model != "demo" and not Path(config.engine.model).is_absolute():
            # Downloads draw bars of their own.
            progress.say(f"looking for {config.engine.model} on the Hugging Face hub")
        preflight.check(config, here=ray_address is None, metrics_port=metrics_port)
        progress("starting Ray" if ray_address is None else "connecting to Ray")
        from quire.cluster.cli.ray_session import cluster
        from quire.cluster.cli.rollout import served

        with cluster(config, ray_address, metrics_port or 0):
            interrupts.orderly()
            with served(config, progress) as port:
                yield port, progress


def with_replicas(branch: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The branch with another number of replicas, or other bounds; the file's other knobs stay."""
    kept = {key: value for key, value in branch.items() if key not in ("count", "autoscaling")}
    if bounds := chosen.get("autoscaling"):
        return {**kept, "autoscaling": {**(branch.get("autoscaling") or {}), **bounds}}
    return {**kept, **chosen}


def _read_tree(path: Path | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values")
    return tree


COMMANDS = (serve_command, deploy, gateways, layout, demo)
