"""The `quire` command. The only file that reads environment variables.

Exit codes: 0 done, 1 it cannot be done (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click
import yaml

from quire.cluster.api.client import Answer, CallOptions, Client
from quire.cluster.config import ServeConfig, parse
from quire.kernels.formats import FormatError
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import ConfigError, InvalidRequest, QuireError, ReplicaDied
from quire.replicas.request import SamplingParams

APP = "quire"
DEFAULT_ADDRESS = "127.0.0.1:8100"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Replicas(click.ParamType[dict[str, Any]]):
    """`3`, or `1..4`: keys of the replicas' branch of the configuration."""

    name = "number or LEAST..MOST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
        if found is None:
            self.fail(f"{value!r} is neither a number nor LEAST..MOST, such as 1..4", param, ctx)
        least, most = found.groups()
        return {"autoscaling": {"min": int(least), "max": int(most)}} if most else {"count": int(least)}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "QUIRE"})
def cli() -> None:
    """Serve language models with a quantized, shared KV cache.

    Every option can be set by a variable as well: QUIRE_SERVE_PORT=9000 is `quire serve --port 9000`.
    """


def main() -> None:
    """Entry point: errors meant for people become one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (QuireError, FormatError) as error:
        click.echo(f"quire: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)


def _compose(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_kv_options = _compose(
    click.option("--kv", help="KV format: bf16, fp8, int8, int4, k8v4, ...  [default: int8]"),
    click.option("--policy", type=_FILE, help="JSON file with a format per layer and side, for --kv."),
)
_cluster_options = _compose(
    click.option(
        "--ray-address",
        default="auto",
        show_default=True,
        envvar="RAY_ADDRESS",
        help="The Ray cluster (RAY_ADDRESS).",
    ),
    click.option("--app", default=APP, show_default=True, help="The application's name in Ray Serve."),
)
_client_options = _compose(
    click.option(
        "--address",
        default=DEFAULT_ADDRESS,
        show_default=True,
        envvar="QUIRE_ADDRESS",
        help="The gateway, host:port, or several with commas (QUIRE_ADDRESS).",
    )
)
_sampling_options = _compose(
    click.option("--max-tokens", default=256, show_default=True, help="Output tokens at most."),
    click.option("--temperature", type=float, help="0: greedy.  [default: the model's]"),
    click.option("--top-p", type=float, help="Share of the likeliest tokens.  [default: the model's]"),
    click.option("--seed", type=int, help="Same seed, same answer."),
    click.option("--stop", multiple=True, help="End before this text; may be repeated."),
    click.option("--deadline", type=float, help="Give up after so many seconds."),
)


@cli.command("serve")
@click.argument("model", required=False)
@click.option("--config", "config_file", type=_FILE, help="YAML file; the options below go before it.")
@_kv_options
@click.option("--tp", type=int, help="Tensor-parallel shards of a replica.")
@click.option("--replicas", type=Replicas(), help="Whole engines: a number, or LEAST..MOST as the load asks.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0: any free one.  [default: 8100]")
@click.option(
    "--ray-address", envvar="RAY_ADDRESS", help="A running Ray cluster (RAY_ADDRESS); none: our own."
)
def serve_command(
    model: str | None,
    config_file: Path | None,
    kv: str | None,
    policy: Path | None,
    tp: int | None,
    replicas: dict[str, Any] | None,
    host: str | None,
    port: int | None,
    ray_address: str | None,
) -> None:
    """Serve MODEL (a folder, a Hugging Face id, or "demo") until interrupted."""
    tree = _read_tree(config_file)
    chosen: dict[str, dict[str, Any]] = {
        "engine": {"model": model, "kv": _policy(kv, policy), "tp": tp},
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
    with _running(config, ray_address):
        click.echo(f"serving {config.engine.model} at {_gateways(APP)}; Ctrl-C ends it", err=True)
        signal.pause()


@cli.command()
@click.argument("config_file", type=_FILE)
@_cluster_options
def deploy(config_file: Path, ray_address: str, app: str) -> None:
    """Roll CONFIG_FILE out on a running Ray cluster: what has changed is replaced, and nothing else.

    CONFIG_FILE: as for `quire serve --config`, or as for `serve deploy`. The application stays up afterwards,
    until `serve delete` takes it down.
    """
    from quire.cluster.cli import preflight
    from quire.cluster.cli.local import cluster, rolled_out

    config = preflight.located(parse(_arguments(_read_tree(config_file), app)))
    preflight.check(config, here=False)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with cluster(config, ray_address):
        rolled_out(config, app, partial(click.echo, err=True))
        click.echo(f"serving {config.engine.model} at {_gateways(app)}", err=True)


@cli.command()
@_cluster_options
def gateways(ray_address: str, app: str) -> None:
    """Addresses of the application's gateways, with commas: `QUIRE_ADDRESS=$(quire gateways)`."""
    from quire.cluster.cli.local import connected

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with connected(ray_address):
        found = _gateways(app)
    if not found:
        raise ConfigError(f"no gateway of application {app!r} is up; `serve status` says more")
    click.echo(found)


def _gateways(app: str) -> str:
    from quire.cluster.gateway_registry import addresses

    return ",".join(addresses(app))


def _arguments(tree: dict[str, Any], app: str) -> dict[str, Any]:
    """Quire's own part of a Serve config file; the whole of any other."""
    if "applications" not in tree:
        return tree
    for one in tree["applications"]:
        if one.get("name") == app:
            return dict(one.get("args") or {})
    raise ConfigError(f"the file has no application {app!r}; give its name with --app")


@cli.command()
@click.argument("prompt")
@_sampling_options
@_client_options
def generate(prompt: str, address: str, **options: Any) -> None:
    """Continue PROMPT ("-": from standard input)."""
    text = _read_standard_input() if prompt == "-" else prompt
    sampling, call = _sampling(options)
    with Client(address) as client:
        _print_stream(client.generate(text, sampling, call))


@cli.command()
@click.argument("message", required=False)
@click.option("--system", help="What the model is told first.")
@_sampling_options
@_client_options
def chat(message: str | None, system: str | None, address: str, **options: Any) -> None:
    """Chat: answer MESSAGE, or talk until end of input."""
    turns = [("system", system)] if system else []
    sampling, call = _sampling(options)
    with Client(address) as client:
        for said in [message] if message else _typed_lines():
            turns.append(("user", said))
            answer = _print_stream(client.chat(turns, sampling, call))
            turns.append(("assistant", answer.text))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@_client_options
def stats(as_json: bool, address: str) -> None:
    """What is served, in which formats, and how the cache is used."""
    from google.protobuf.json_format import MessageToJson

    from quire.cluster.cli.stats_text import stats_lines

    with Client(address) as client:
        found = client.stats()
    click.echo(
        MessageToJson(found, preserving_proto_field_name=True) if as_json else "\n".join(stats_lines(found))
    )


@cli.command()
@click.option("--once", is_flag=True, help="One look instead of one after the other, for scripts.")
@click.option("--every", default=2.0, show_default=True, help="Seconds between two looks.")
@_client_options
def top(once: bool, every: float, address: str) -> None:
    """Replicas, rates, cache and transfers, drawn again and again until interrupted."""
    from quire.cluster.cli.top import top_lines

    if every <= 0:
        raise click.UsageError(f"--every is a positive number of seconds, got {every:g}")
    with Client(address) as client:
        before, asked_s = client.stats(), time.monotonic()
        while True:
            time.sleep(every)
            try:
                now, now_s = client.stats(), time.monotonic()
                text = "\n".join(top_lines(before, now, now_s - asked_s))
                before, asked_s = now, now_s
            except ReplicaDied as error:  # it may come back: look again
                if once:
                    raise
                text = f"no answer: {error}"
            if once:
                click.echo(text)
                return
            click.clear()
            click.echo(text)


@cli.command()
@click.argument("model")
@_kv_options
@click.option("--page-tokens", default=64, show_default=True, help="16, 32 or 64.")
def layout(model: str, kv: str | None, policy: Path | None, page_tokens: int) -> None:
    """What a token of MODEL costs in each KV format; needs its config.json only."""
    from quire.cluster.cli.format_costs import format_costs, policy_cost

    if kv or policy:
        name = kv or str(policy)
        costs = [policy_cost(model, _policy(kv, policy) or name, name=name, page_tokens=page_tokens)]
    else:
        costs = list(format_costs(model, page_tokens))
    click.echo(f"{'format':<12}{'bytes per token':>16}{'of bf16':>10}{'tokens in the memory of one':>30}")
    for cost in costs:
        more = 1 / cost.share_of_bf16
        click.echo(f"{cost.name:<12}{cost.bytes_per_token:>16,.1f}{cost.share_of_bf16:>10.3f}{more:>29.2f}x")


@cli.command()
@click.option("--kv", default="int4", show_default=True, help="KV format.")
@click.option("--tp", default=2, show_default=True, help="Tensor-parallel shards.")
def demo(kv: str, tp: int) -> None:
    """Serve a small model and let it find a fact far back in a chat; leaves nothing running."""
    from quire.cluster.cli.demo import demo_config, run_demo

    with _running(demo_config(kv, tp), None) as port:
        run_demo(f"127.0.0.1:{port}", click.echo, partial(click.echo, nl=False))


@cli.command()
@click.argument("cluster_file", type=_FILE)
def down(cluster_file: Path) -> None:
    """Take down the cluster of CLUSTER_FILE (as for `ray up`), and look whether nothing of it lives on."""
    from quire.cluster.teardown import take_down

    if not take_down(cluster_file, click.echo):
        raise QuireError("something lives on, or may; the lines above say where")


@contextmanager
def _running(config: ServeConfig, ray_address: str | None) -> Iterator[int]:
    """The application, up; gives the gateway's port. Ctrl-C and SIGTERM both take it down in order."""
    from quire.cluster.cli import preflight
    from quire.cluster.cli.local import cluster, served

    config = preflight.located(config)
    preflight.check(config, here=ray_address is None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    signal.signal(signal.SIGTERM, _interrupt)
    click.echo("starting Ray", err=True)
    with cluster(config, ray_address):
        signal.signal(signal.SIGTERM, _interrupt)  # again: Ray has put its own there, which aborts
        with served(config, partial(click.echo, err=True)) as port:
            yield port


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def with_replicas(branch: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The branch with another number of replicas, or other bounds; the file's other knobs stay."""
    kept = {key: value for key, value in branch.items() if key not in ("count", "autoscaling")}
    if bounds := chosen.get("autoscaling"):
        return {**kept, "autoscaling": {**(branch.get("autoscaling") or {}), **bounds}}
    return {**kept, **chosen}


def _read_tree(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values")
    return tree


def _policy(kv: str | None, policy: Path | None) -> str | dict[str, object] | None:
    if policy is None:
        return kv
    if kv is not None:
        raise click.UsageError("--kv and --policy say the same thing; give one of them")
    try:
        tree = json.loads(policy.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{policy} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f'{policy} must hold {{"default": {{"k": ..., "v": ...}}, "layers": {{...}}}}')
    return tree


def _sampling(options: dict[str, Any]) -> tuple[SamplingParams, CallOptions]:
    sampling = SamplingParams(
        max_tokens=options["max_tokens"],
        temperature=options["temperature"],
        top_p=options["top_p"],
        seed=options["seed"],
        stop=options["stop"],
    )
    return sampling, CallOptions(deadline_s=options["deadline"])


def _read_standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompt from standard input is not UTF-8: {error}") from error


def _typed_lines() -> Iterator[str]:
    """What the user types, line by line, until end of input."""
    click.echo("you> ", nl=False, err=True)
    for line in sys.stdin:
        if said := line.strip():
            yield said
        click.echo("you> ", nl=False, err=True)


def _print_stream(deltas: Iterable[inference_pb2.Delta]) -> Answer:
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
        click.echo(delta.text, nl=False)
    click.echo()
    return answer


if __name__ == "__main__":
    main()
