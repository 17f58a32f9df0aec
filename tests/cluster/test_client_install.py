"""What a client's installation can do, which has click, grpcio and protobuf and nothing else of ours."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from gateway_thread import gateway_thread

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"grpcio": ("grpc", "typing_extensions"), "protobuf": ("google",), "click": ("click",)}
CLIENT_ONLY = """
import sys
class ClientOnly:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top != "quire" and top not in {allowed} and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, ClientOnly())
"""


def _run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code where only what the base dependencies bring can be imported."""
    names = [re.split(r"[<>=;\s]", one)[0] for one in PROJECT["dependencies"]]
    allowed = {name for package in names for name in IMPORTED_AS[package]}
    code = CLIENT_ONLY.format(allowed=allowed) + code
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, check=False
    )


def _quire(*args: str) -> subprocess.CompletedProcess[str]:
    return _run("from quire.cluster.cli.main import main; main()", *args)


def test_the_names_of_the_client_load_nothing_else():
    done = _run("import quire.cluster as c; print(len([getattr(c, name) for name in c.__all__]))")
    assert (done.stderr, int(done.stdout) > 10) == ("", True)


def test_the_commands_of_a_client_work():
    def answer(engine, request):
        engine.say(request, "fine", 4, last=True)

    with gateway_thread(answer) as address:
        at = ("--address", address)
        for args in (("generate", "Hello!"), ("chat", "Hello!")):
            done = _quire(*args, *at)
            assert (done.stderr, done.stdout) == ("", "fine\n")
        assert "bytes per token" in _quire("stats", *at).stdout
        assert '"architecture"' in _quire("stats", "--json", *at).stdout
        assert "1 replicas" in _quire("top", "--once", "--every", "0.01", *at).stdout


@pytest.mark.parametrize("command", ["serve demo", "demo", "layout demo", "gateways", "serve"])
def test_what_needs_more_says_what_to_install_in_one_line(command):
    done = _quire(*command.split())
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "pip install 'quire[serve]'" in line
    assert _quire(command.split()[0], "-h").returncode == 0


def test_an_offline_llm_says_what_to_install():
    done = _run("from quire.replicas import SamplingParams, LLM")
    assert "quire.replicas.LLM needs" in done.stderr.splitlines()[-1]
    assert "pip install 'quire[engine]'" in done.stderr.splitlines()[-1]


def test_every_extra_is_a_superset_of_the_client():
    assert PROJECT["optional-dependencies"]["client"] == []
    assert "quire[engine]" in PROJECT["optional-dependencies"]["serve"]
