"""Hosts on one machine, for tests: each with a network, processes, mounts and a name of its own, and sshd.

They hang on one switch, are reached by nobody else, and leave nothing: all of it lives in namespaces that end
with their processes. The root file system is shared; home, /tmp/ray and /dev/shm are not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

NETWORK = "10.77.0"
USER = "quire"
HOME = Path("/home/quire")
VENV = Path(sys.prefix)
ROOT = Path(__file__).parents[2]
_START_S = 30
_SWITCH = (
    "ip link set lo up && ip link add switch type bridge && ip link set switch up && exec sleep infinity"
)
_BECOME = """
set -eu
mount --make-rprivate /
hostname {name}
ip link set lo up
mkdir -p {scratch}/home {scratch}/ray {scratch}/upper {scratch}/work /run/sshd /tmp/ray {home}
mount --bind {scratch}/home {home}
mount --bind {scratch}/ray /tmp/ray
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run/sshd
for file in passwd hosts resolv.conf pip.conf; do
    [ -e /etc/$file ] || touch /etc/$file
    mount --bind {shared}/$file /etc/$file
done
{venv}
exec /usr/sbin/sshd -D -e -f {shared}/sshd_config -h {shared}/host_key
"""
_PRIVATE_VENV = """
mount -t overlay overlay -o lowerdir={venv},upperdir={scratch}/upper,workdir={scratch}/work {venv}
mkdir -p {home}/quire/.venv
mount --bind {venv} {home}/quire/.venv
cp {root}/constraints.txt {venv}/installed.txt
touch {venv}/.runtime
"""
_SSHD = """
ListenAddress 0.0.0.0
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
PidFile none
AuthorizedKeysFile {shared}/authorized_keys
Subsystem sftp internal-sftp
"""


def why_not() -> str | None:
    """Why this machine cannot have such hosts."""
    if os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split()[2] == "1":
        return "sshd and overlays need root; this is not it, or only in a namespace"
    missing = [tool for tool in ("/usr/sbin/sshd", "ssh", "rsync", "ip", "unshare") if not shutil.which(tool)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: openssh-server, rsync, iproute2, util-linux)"
    return None


class Host:
    """One of them."""

    def __init__(self, name: str, address: str, pid: int, environment: Mapping[str, str]) -> None:
        self.name, self.address, self.pid, self._environment = name, address, pid, environment

    def start(self, command: Sequence[str], cwd: Path = HOME, **options: object) -> subprocess.Popen[str]:
        """A process of this host, started from outside and not over ssh."""
        inside = f"cd {shlex.quote(str(cwd))} && exec {shlex.join(command)}"
        enter = ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", "sh", "-c", inside]
        return subprocess.Popen(enter, text=True, env=dict(self._environment), **options)  # type: ignore[call-overload,no-any-return]

    def run(
        self, command: Sequence[str], timeout_s: float, cwd: Path = HOME
    ) -> subprocess.CompletedProcess[str]:
        """Its output, both streams in one. Raises AssertionError with it if it takes longer."""
        with tempfile.TemporaryFile("w+") as out:  # a pipe would stay open as long as what it leaves behind
            process = self.start(command, cwd, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
                raise AssertionError(f"{shlex.join(command)} took over {timeout_s} s: {_read(out)}") from None
            return subprocess.CompletedProcess(command, process.returncode, _read(out))

    def processes(self) -> dict[int, str]:
        """Everything that runs there but sshd: command lines by process id, as numbered there."""
        listed = self.run(["ps", "-eo", "pid=,args="], 10).stdout
        rows = (line.split(None, 1) for line in listed.splitlines())
        return {int(pid): args for pid, args in rows if "sshd" not in args and "ps -eo" not in args}


class Hosts:
    """What `hosts` puts up."""

    def __init__(self, hosts: Sequence[Host], switch: int) -> None:
        self.all, self._switch = hosts, switch

    def link(self, host: Host, state: str) -> None:
        """Pulls a host's cable (`down`) or plugs it in (`up`)."""
        _in_network(self._switch, ["ip", "link", "set", f"to-{host.name}", state])


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@contextmanager
def hosts(scratch: Path, names: Sequence[str], *, wheels: Path | None = None) -> Iterator[Hosts]:
    """Hosts 1, 2, ... of NETWORK, gone at the end with all that ran on them.

    Each has the virtual environment of these tests as ~/quire/.venv, to change as it likes, with the marks of
    a complete installation. With `wheels`, none has any Python package, and this folder is where pip looks.
    """
    assert not why_not(), why_not()
    shared = scratch / "shared"
    shared.mkdir()
    _write_shared(shared, names, wheels)
    environment = _environment(bare=wheels is not None)
    with ExitStack() as stack:
        switch = stack.enter_context(
            _holder(["unshare", "--net", "sh", "-c", _SWITCH], scratch / "switch.log")
        )
        found = []
        for number, name in enumerate(names, start=1):
            own = scratch / name
            own.mkdir()
            paths = {"root": ROOT, "name": name, "scratch": own, "shared": shared, "home": HOME}
            venv = "" if wheels else _PRIVATE_VENV.format(**paths, venv=VENV)
            command = ["unshare", *("--net", "--mount", "--pid", "--uts", "--fork", "--kill-child")]
            become = [*command, "--mount-proc", "bash", "-c", _BECOME.format(**paths, venv=venv)]
            outer = stack.enter_context(_holder(become, own / "sshd.log"))
            pid = _child(outer)
            address = f"{NETWORK}.{number}"
            _plug(switch, pid, name, address)
            found.append(Host(name, address, pid, environment))
        for host, name in zip(found, names, strict=True):
            _await_ssh(host, scratch / name / "sshd.log")
        yield Hosts(found, switch)


def _write_shared(shared: Path, names: Sequence[str], wheels: Path | None) -> None:
    """What the hosts' /etc differs in from this machine's, and keys."""
    for key in ("host_key", "id"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(shared / key)], check=True, timeout=20
        )
    shutil.copy(shared / "id.pub", shared / "authorized_keys")
    (shared / "sshd_config").write_text(_SSHD.format(shared=shared))
    me = f"{USER}:x:0:0::{HOME}:/bin/bash\n"  # before root: so this is what user 0 is called
    (shared / "passwd").write_text(me + Path("/etc/passwd").read_text())
    lines = [f"{NETWORK}.{number} {name}" for number, name in enumerate(names, start=1)]
    (shared / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    (shared / "resolv.conf").write_text("")  # nobody to ask, so nobody waits for an answer
    found = f"find-links = {wheels}" if wheels else "no-build-isolation = false"
    (shared / "pip.conf").write_text(f"[global]\nno-index = true\n{found}\n")


def _environment(*, bare: bool = False) -> dict[str, str]:
    """A login's, of one who has this virtual environment on the path and no more; if bare, not even that."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    path = path if bare else f"{VENV / 'bin'}:{path}"
    kept = {k: v for k, v in os.environ.items() if k in ("LANG", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    return {**kept, "PATH": path, "HOME": str(HOME), "USER": USER, "SHELL": "/bin/bash", "TERM": "dumb"}


@contextmanager
def _holder(command: Sequence[str], log: Path) -> Iterator[int]:
    """A process whose namespaces others enter; they end with it."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=_environment()
        )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait(timeout=20)


def _child(parent: int) -> int:
    """The first process of the namespaces that `unshare --fork` has made."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + _START_S
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline, "unshare started nothing"
        time.sleep(0.02)
    return int(found[0])


def _plug(switch: int, host: int, name: str, address: str) -> None:
    """A cable from the host to the switch."""
    deadline = time.monotonic() + _START_S
    while subprocess.run(
        ["nsenter", "-t", str(switch), "-n", "ip", "link", "show", "switch"], capture_output=True, timeout=10
    ).returncode:
        assert time.monotonic() < deadline, "no switch"
        time.sleep(0.05)
    cable = f"to-{name}"
    _in_network(
        switch, ["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(host)]
    )
    _in_network(switch, ["ip", "link", "set", cable, "master", "switch", "up"])
    _in_network(host, ["ip", "address", "add", f"{address}/24", "dev", "eth0"])
    _in_network(host, ["ip", "link", "set", "eth0", "up"])
    _in_network(host, ["ip", "route", "add", "default", "via", f"{NETWORK}.254"])


def _in_network(pid: int, command: Sequence[str]) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", *command], check=True, timeout=10)


def _await_ssh(host: Host, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while "Server listening" not in log.read_text():
        assert time.monotonic() < deadline, f"{host.name} does not answer over ssh: {log.read_text()}"
        time.sleep(0.05)
