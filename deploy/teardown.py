"""Takes a cluster down and checks that it is gone: `python deploy/teardown.py deploy/ray/on-prem.yaml`.

`ray down` alone is not enough: it stops Ray with a command that may not be found on the node, prints a
warning, and reports that no node remains. So each host of the file is asked afterwards over the file's own
ssh settings; on a cloud, the provider is asked which machines it still counts.
"""

from __future__ import annotations

import argparse
import os.path
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from quire.replicas.errors import ConfigError

RAY_DOWN_S = 300.0
_SSH_S = 60.0
_CONNECT_S = 10
_GONE_S = 120.0
_PATTERNS = (
    "[/]raylet/raylet ",
    "[/]gcs/gcs_server ",
    "^ray::",
    "[/]site-packages/ray/",  # agents, log monitor, autoscaler, workers that have no title yet
    "[/]bin/ray start ",
)
"""What Ray's processes are called; the brackets keep a pattern from finding the shell that looks for it."""
_SWEEP = """
find_ray() {{ pgrep -u "$(id -u)" -f '{pattern}'; }}
find_ray | sed 's/^/found /'
for signal in TERM KILL; do
    find_ray | xargs -r kill -$signal 2>/dev/null
    for _ in $(seq 20); do find_ray > /dev/null || break; sleep 0.25; done
done
find_ray | sed 's/^/alive /'
echo swept
"""


@dataclass(frozen=True, slots=True)
class Login:
    """How to reach one host."""

    host: str
    user: str
    key: str | None = None
    proxy_command: str | None = None

    def command(self, script: str) -> list[str]:
        """The ssh command that runs a script there. Hosts are not remembered, as `ray up` does not either."""
        options = {
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "BatchMode": "yes",
            "ConnectTimeout": str(_CONNECT_S),
            **({"ProxyCommand": self.proxy_command} if self.proxy_command else {}),
        }
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        key = ["-i", os.path.expanduser(self.key)] if self.key else []
        return ["ssh", *given, *key, f"{self.user}@{self.host}", script]


@dataclass(frozen=True, slots=True)
class Found:
    """What was on one machine once `ray down` had returned."""

    machine: str
    processes: int = 0
    """Ray's processes (on a cloud, the machine itself) that were still there, and were told to end."""
    alive: int = 0
    """Ray's processes that did not."""
    unknown: str | None = None
    """Why no one can say."""

    @property
    def gone(self) -> bool:
        return not self.alive and self.unknown is None

    def line(self) -> str:
        if self.unknown is not None:
            return f"{self.machine}: unknown: {self.unknown}"
        if self.alive:
            return f"{self.machine}: {self.alive} of Ray's processes live on"
        left = f"{self.processes} left over, ended" if self.processes else "nothing left"
        return f"{self.machine}: {left}"


def read_cluster(path: Path) -> dict[str, Any]:
    """Raises ConfigError if the file describes no cluster."""
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    provider = tree.get("provider") if isinstance(tree, dict) else None
    if not isinstance(provider, dict) or "type" not in provider:
        raise ConfigError(f"{path} describes no Ray cluster: it has no provider with a type")
    return dict(tree)


def logins(tree: Mapping[str, Any]) -> list[Login]:
    """The hosts of a cluster of provider `local`, the head first: it would start Ray on the others again."""
    provider, auth = tree["provider"], tree.get("auth") or {}
    missing = [key for key in ("head_ip", "worker_ips") if key not in provider]
    if missing or "ssh_user" not in auth:
        lacks = ", ".join([f"provider.{key}" for key in missing] or ["auth.ssh_user"])
        raise ConfigError(f"the cluster's file does not say which hosts to look at: it lacks {lacks}")
    user, key, proxy = auth["ssh_user"], auth.get("ssh_private_key"), auth.get("ssh_proxy_command")
    head = Login(provider.get("external_head_ip") or provider["head_ip"], user, key, proxy)
    through = " ".join(["ssh", *_through(head)]) if provider.get("external_head_ip") else proxy
    return [head, *(Login(ip, user, key, through) for ip in provider["worker_ips"])]


def sweep_script() -> str:
    """Shell that ends its user's Ray, and prints `found PID` and `alive PID` lines, then `swept`."""
    return _SWEEP.format(pattern="|".join(_PATTERNS))


def found_by(machine: str, code: int, said: str, complaint: str) -> Found:
    """What the sweep of a host came to, from its exit code and what it printed."""
    lines = said.split("\n")
    if code or "swept" not in lines:
        last = (complaint.strip().splitlines() or [f"ssh ended with code {code}"])[-1]
        return Found(machine, unknown=last)
    count = {word: sum(line.startswith(word + " ") for line in lines) for word in ("found", "alive")}
    return Found(machine, processes=count["found"], alive=count["alive"])


def take_down(path: Path, say: Callable[[str], None]) -> bool:
    """`ray down`, then the truth about every machine, a line each. Whether nothing lives on.

    Raises ConfigError if the file does not describe a cluster.
    """
    tree = read_cluster(path)
    local = tree["provider"]["type"] == "local"
    hosts = logins(tree) if local else []
    say(_ray_down(path))
    found = _sweep(hosts) if local else end_machines(_provider(tree))
    for one in found:
        say(one.line())
    return all(one.gone for one in found)


class Provider(Protocol):
    """Ray's node provider, as far as it is needed here."""

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]: ...
    def terminate_nodes(self, node_ids: list[str]) -> Any: ...


def end_machines(provider: Provider, wait_s: float = _GONE_S, poll_s: float = 5.0) -> list[Found]:
    """Ends what a provider still counts of the cluster, and waits until it counts none."""
    left = provider.non_terminated_nodes({})
    if not left:
        return [Found("the provider's machines")]
    provider.terminate_nodes(left)
    deadline = time.monotonic() + wait_s
    while (alive := set(provider.non_terminated_nodes({}))) and time.monotonic() < deadline:
        time.sleep(poll_s)
    late = f"the provider still counts it after {wait_s:.0f} s; end it by hand"
    return [Found(node, processes=1, unknown=late if node in alive else None) for node in left]


def _through(head: Login) -> list[str]:
    """Arguments for an ssh that forwards its own input and output to the host asked for."""
    words = head.command("")[1:-1]
    return ["-W", "%h:%p", *(f"'{word}'" if " " in word else word for word in words)]


def _ray_down(path: Path) -> str:
    """Its outcome in a few words; it is not believed either way."""
    command = [str(Path(sys.executable).parent / "ray"), "down", "-y", str(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RAY_DOWN_S
        )
    except subprocess.TimeoutExpired:
        return f"ray down: did not return within {RAY_DOWN_S:.0f} s"
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return f"ray down: failed: {' '.join(last)}"
    return "ray down: done, as it says"


def _sweep(hosts: Sequence[Login]) -> list[Found]:
    """The head's first; then all others', its own once more."""
    first = _sweep_host(hosts[0])
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        head, *workers = pool.map(_sweep_host, hosts)
    processes = first.processes + head.processes
    return [Found(head.machine, processes, head.alive, head.unknown), *workers]


def _sweep_host(login: Login) -> Found:
    try:
        done = subprocess.run(
            login.command(sweep_script()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SSH_S,
        )
    except subprocess.TimeoutExpired:
        return Found(login.host, unknown=f"no answer over ssh within {_SSH_S:.0f} s")
    return found_by(login.host, done.returncode, done.stdout, done.stderr)


def _provider(tree: Mapping[str, Any]) -> Provider:
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(dict(tree))
    provider: Provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    return provider


def main() -> None:
    """Exits with 1 if something still runs, or may."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("cluster_file", type=Path, help="the cluster, as for `ray up`")
    try:
        gone = take_down(arguments.parse_args().cluster_file, print)
    except (ConfigError, OSError) as error:
        sys.exit(f"teardown: {error}")
    if not gone:
        sys.exit("teardown: something still runs, or may; the lines above say where")


if __name__ == "__main__":
    main()
