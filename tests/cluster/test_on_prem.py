"""docs/deploy.md's first chapter, word for word, on three hosts and a fourth to ask from; and mishaps."""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hosts
import pytest
import yaml
from asker import PROMPTS
from hosts import HOME, Host, Hosts

ROOT = Path(__file__).parents[2]
ASKER = ROOT / "tests/support/asker.py"
CHECKOUT = HOME / "quire"
GATEWAY = "10.77.0.1:8100"
DEADLINE_S = 15.0
CUT_S = 12.0
WHOLE_S = 150.0
TYPED_S = 400
INSTALLED_S = 1500
"""For hosts that have nothing, each with two gigabytes to install."""

pytestmark = [pytest.mark.ray, pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))]


@dataclass
class Outcome:
    prompt: str
    start: float
    seconds: float
    tokens: list[int] | None = None
    error: str | None = None


def chapter(*sections: str) -> str:
    """The commands of sections of the first chapter, as a reader would type them one after the other."""
    page = (ROOT / "docs/deploy.md").read_text()
    on_prem = re.split(r"^## ", page, flags=re.MULTILINE)[1]
    texts = {part.split("\n", 1)[0]: part for part in re.split(r"^### ", on_prem, flags=re.MULTILINE)[1:]}
    blocks = [
        b for s in sections for b in re.findall(r"^```sh\n(.*?)^```", texts[s], re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    return "".join(blocks)


def typed(client: Host, commands: str, timeout_s: float) -> str:
    """What a shell on the client's machine prints for the commands; each of them must succeed."""
    path = f"export PATH={CHECKOUT}/.venv/bin:$PATH\n"
    done = client.run(["bash", "-euxo", "pipefail", "-c", path + commands], timeout_s, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture
def scratch() -> Iterator[Path]:
    folder = Path(
        tempfile.mkdtemp(prefix="qh", dir="/var/tmp")
    )  # overlays want a disk, Ray's sockets short paths
    yield folder
    shutil.rmtree(folder)


@contextmanager
def asking(client: Host, log: Path) -> Iterator[None]:
    command = [str(CHECKOUT / ".venv/bin/python"), str(ASKER), GATEWAY, str(DEADLINE_S)]
    with log.open("w") as out:
        process = client.start(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        for pid, line in client.processes().items():
            if "asker.py" in line:
                client.run(["kill", str(pid)], 10)
        process.wait(timeout=20)


def outcomes(log: Path) -> list[Outcome]:
    return [Outcome(**json.loads(line)) for line in log.read_text().splitlines() if line.endswith("}")]


def await_whole(head: Host, replicas: int) -> float:
    """Seconds until Serve says that all is well and so many replicas run."""
    start = time.monotonic()
    ask = "source ~/quire/deploy/ray/env.sh && serve status --name quire 2> /dev/null"
    while time.monotonic() < start + WHOLE_S:
        said = head.run(["bash", "-c", ask], 60)
        app = yaml.safe_load(said.stdout) if said.returncode == 0 else {}
        states = app.get("deployments", {}).get("Replica", {}).get("replica_states")
        if app.get("status") == "RUNNING" and states == {"RUNNING": replicas}:
            return time.monotonic() - start
        time.sleep(0.5)
    raise AssertionError(f"not whole after {WHOLE_S} s: {said.stdout}")


def prepare(client: Host, scratch: Path) -> None:
    """What the chapter takes for granted: a checkout, a key that hosts take, replicas that spread."""
    for host in (scratch / "shared", *scratch.glob("*/home")):
        host.mkdir(exist_ok=True)
    home = scratch / "client/home"
    (home / ".ssh").mkdir()
    shutil.copy(scratch / "shared/id", home / ".ssh/id_ed25519")
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout
    subprocess.run(
        ["rsync", "-a", "--from0", "--files-from=-", f"{ROOT}/", str(home / "quire")],
        input=files,
        check=True,
        timeout=60,
    )
    file = home / "quire/deploy/ray/serve.yaml"
    tree = yaml.safe_load(file.read_text())
    (app,) = tree["applications"]
    app["args"]["engine"] |= {"threads_per_shard": 1, "pool": {"bytes": 16 << 20}}
    app["args"]["replicas"] |= {"cpus_per_shard": 1.5}  # of a host's two: no two on one host
    file.write_text(yaml.safe_dump(tree))


def test_the_chapter_works_as_it_stands_and_the_cluster_outlives_its_hosts_mishaps(
    scratch: Path, pytestconfig: pytest.Config
):
    wheels = pytestconfig.getoption("wheels")
    with hosts.hosts(scratch, ["head", "worker1", "worker2", "client"], wheels=wheels) as machines:
        head, _, _, client = machines.all
        prepare(client, scratch)
        began = time.monotonic()
        commands = chapter("What each host needs", "Start the cluster")
        typed(client, commands, INSTALLED_S if wheels else TYPED_S)
        print(f"the cluster stood after {time.monotonic() - began:.0f} s")
        said = typed(client, chapter("Serve", "Watch"), TYPED_S)
        print(f"a request was served and a query answered after {time.monotonic() - began:.0f} s")
        assert "71432" in said.split("quire chat")[-1]
        assert '"status": "RUNNING"' in said or '"status":"RUNNING"' in said
        assert re.search(r"=> \d+ @", said)
        suffer(machines, client, scratch / "asked.jsonl")
        for pid, line in head.processes().items():
            if "prometheus" in line:
                head.run(["kill", str(pid)], 10)
        said = typed(client, chapter("Take it down"), 200)
        left = {host.name: host.processes() for host in machines.all}
        assert not any(left.values()), (left, said)


def suffer(machines: Hosts, client: Host, log: Path) -> None:
    """A cable is cut and plugged in again, then a raylet killed, while the client asks."""
    head, worker1, worker2, _ = machines.all
    await_whole(head, 3)
    with asking(client, log):
        until(lambda: {one.prompt for one in outcomes(log)} == set(PROMPTS), 60)
        right = {one.prompt: one.tokens for one in outcomes(log)}
        cut = time.time()
        machines.link(worker1, "down")
        time.sleep(CUT_S)
        machines.link(worker1, "up")
        print(f"whole {await_whole(head, 3):.1f} s after the cable was plugged in again")
        killed = time.time()
        (raylet,) = [pid for pid, line in worker2.processes().items() if "/raylet/raylet " in line]
        worker2.run(["kill", "-KILL", str(raylet)], 10)
        time.sleep(1)
        until(lambda: any("/raylet/raylet " in line for line in worker2.processes().values()), WHOLE_S)
        print(f"Ray was started on the host again {time.time() - killed:.1f} s after its raylet was killed")
        await_whole(head, 3)
        print(f"whole {time.time() - killed:.1f} s after it")
    asked = outcomes(log)
    failed = [one for one in asked if one.error]
    print(
        f"{len(asked)} asked, {len(failed)} failed",
        *(f"{o.start - cut:+.1f} s {o.error}" for o in failed),
        sep="\n",
    )
    assert all(one.tokens == right[one.prompt] for one in asked if one.error is None)
    assert {one.error.split(":")[0] for one in failed if one.error} <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    for blow in (cut, killed):
        during = [one for one in asked if blow <= one.start + one.seconds and one.start <= blow + CUT_S]
        answered = [one for one in during if one.error is None]
        assert any(one.start >= blow for one in answered), "nothing was answered meanwhile"
        slowest_s = max(one.seconds for one in answered)
        print(f"{len(answered)} of {len(during)} were answered then, the slowest after {slowest_s:.1f} s")
    assert not [one for one in failed if one.start + one.seconds < cut]


def until(condition, bound_s: float) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)
