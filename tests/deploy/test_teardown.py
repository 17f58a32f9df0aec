"""What `deploy/teardown.py` asks the hosts, and what it concludes; test_on_prem.py uses it."""

import json
import os
import subprocess
import sys

import pytest
import teardown
import yaml
from teardown import Found, Login, end_machines, found_by, logins, read_cluster, sweep_script

from quire.replicas.errors import ConfigError

LOCAL = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
AUTH = {"ssh_user": "quire", "ssh_private_key": "~/.ssh/id"}


def test_the_head_comes_first_and_every_host_has_the_files_own_settings():
    hosts = logins({"provider": LOCAL, "auth": {**AUTH, "ssh_proxy_command": "nc proxy %h %p"}})
    assert [one.host for one in hosts] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    command = hosts[1].command("true")
    assert command[0] == "ssh"
    assert command[-2:] == ["quire@10.0.0.2", "true"]
    assert command[command.index("-i") + 1] == os.path.expanduser("~/.ssh/id")
    assert "ProxyCommand=nc proxy %h %p" in command


def test_workers_behind_a_head_with_an_outer_address_are_reached_through_it():
    head, worker, _ = logins({"provider": {**LOCAL, "external_head_ip": "203.0.113.9"}, "auth": AUTH})
    assert head.host == "203.0.113.9"
    assert head.proxy_command is None
    assert worker.host == "10.0.0.2"
    assert worker.proxy_command is not None
    assert "-W %h:%p" in worker.proxy_command
    assert worker.proxy_command.endswith("quire@203.0.113.9")


@pytest.mark.parametrize(
    ("provider", "auth", "lacks"),
    [
        ({"type": "local", "head_ip": "10.0.0.1"}, AUTH, "provider.worker_ips"),
        ({"type": "local"}, AUTH, "provider.head_ip, provider.worker_ips"),
        (LOCAL, {}, "auth.ssh_user"),
        (LOCAL, None, "auth.ssh_user"),
    ],
)
def test_a_file_that_does_not_name_its_hosts_is_refused(provider, auth, lacks):
    with pytest.raises(ConfigError, match=lacks):
        logins({"provider": provider, "auth": auth})


@pytest.mark.parametrize(
    "text", ["applications: []", "provider: local", "provider: {}", "- 1", "a: b: c", ""]
)
def test_a_file_that_describes_no_cluster_is_refused(tmp_path, text):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"cluster\.yaml"):
        read_cluster(file)


@pytest.mark.parametrize(
    ("code", "said", "line", "gone"),
    [
        (0, "swept\n", "a: nothing left", True),
        (0, "found 7\nfound 8\nswept\n", "a: 2 left over, ended", True),
        (0, "found 7\nfound 8\nalive 8\nswept\n", "a: 1 of Ray's processes live on", False),
        (255, "", "a: unknown: no route", False),
        (0, "found 7\n", "a: unknown: no route", False),  # the connection broke before the end
    ],
)
def test_what_a_host_says_becomes_a_line_and_silence_is_not_taken_for_nothing(code, said, line, gone):
    found = found_by("a", code, said, "debug\nno route\n")
    assert found.line() == line
    assert found.gone is gone


SCENE = """
import json, subprocess, sys

stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if json.loads(sys.argv[1]) else ""
code = ["-c", f"import signal, time; {stubborn} print(1, flush=True); time.sleep(60)"]
other = subprocess.Popen([sys.executable, *code, "an/other/raylet"], stdout=subprocess.PIPE)
# As Ray names its workers: the title is all there is of the command line.
ray = subprocess.Popen(["ray::Replica", *code], executable=sys.executable, stdout=subprocess.PIPE)
for one in (other, ray):
    one.stdout.readline()
done = subprocess.run(["bash", "-c", sys.argv[2]], capture_output=True, text=True, timeout=60)
print(json.dumps([ray.pid, done.returncode, done.stdout, ray.wait(timeout=10), other.poll()]))
"""
ALONE = ["unshare", "-r", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""Where a sweep meets no Ray but the test's own."""


@pytest.mark.skipif(
    subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0, reason="no namespaces here"
)
@pytest.mark.parametrize("stubborn", [False, True])
def test_the_sweep_ends_rays_processes_and_no_other(stubborn):
    command = [*ALONE, sys.executable, "-c", SCENE, json.dumps(stubborn), sweep_script()]
    scene = subprocess.run(command, capture_output=True, text=True, timeout=90)
    pid, code, said, ray_ended, other_ended = json.loads(scene.stdout)
    assert said.splitlines() == [f"found {pid}", "swept"]
    assert ray_ended == (-9 if stubborn else -15)
    assert other_ended is None
    assert found_by("here", code, said, "").gone


def test_a_host_that_does_not_answer_is_reported_and_the_command_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(teardown, "_ray_down", lambda path: "ray down: done, as it says")
    file = tmp_path / "cluster.yaml"
    auth = {**AUTH, "ssh_proxy_command": "false"}  # so ssh reaches nobody
    file.write_text(yaml.safe_dump({"provider": LOCAL, "auth": auth}))
    lines: list[str] = []
    assert not teardown.take_down(file, lines.append)
    assert [line.split(":")[0] for line in lines] == ["ray down", "10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert all("unknown" in line for line in lines[1:])


class Counted:
    """A provider whose machines go so many looks after they were told to."""

    def __init__(self, nodes: list[str], looks: int) -> None:
        self.nodes, self.looks, self.told = nodes, looks, []

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        self.looks -= bool(self.told)
        return self.nodes if self.looks > 0 else []

    def terminate_nodes(self, node_ids: list[str]) -> None:
        self.told = node_ids


def test_machines_that_a_provider_still_counts_are_ended_and_waited_for():
    assert [one.line() for one in end_machines(Counted([], 9))] == ["the provider's machines: nothing left"]
    slow = Counted(["i-1", "i-2"], 3)
    assert end_machines(slow, wait_s=5, poll_s=0.01) == [Found("i-1", 1), Found("i-2", 1)]
    assert slow.told == ["i-1", "i-2"]
    (stuck,) = end_machines(Counted(["i-1"], 10**6), wait_s=0.05, poll_s=0.01)
    assert not stuck.gone


def test_a_login_without_a_key_leaves_the_choice_to_ssh():
    assert "-i" not in Login("a", "quire").command("true")
