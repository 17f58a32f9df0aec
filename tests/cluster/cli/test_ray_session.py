"""What reaches the terminal when Ray is started, reached or not there."""

import subprocess
import sys

import pytest
import ray
from served_app import quire

from quire.cluster.cli.ray_session import connected
from quire.replicas.errors import QuireError

NATIVE = """
import os
from quire.cluster.cli.ray_session import native_errors_only
with native_errors_only():
    os.write(2, b"[2026-12-01 01:01:34,038 W 4 4] network_util.cc:330: Failed to determine local IP\\n")
    os.write(2, b"[2026-12-01 01:01:34,040 E 4 4] client.cc:7: Failed to connect\\n")
    os.write(2, b"out of memory\\n")
os.write(2, b"afterwards\\n")
"""


def test_of_native_texts_only_errors_reach_the_terminal():
    done = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, check=True)
    assert [line[-20:] for line in done.stderr.splitlines()] == [
        "7: Failed to connect",
        "out of memory",
        "afterwards",
    ]


def test_no_cluster_is_one_line():
    done = quire("serve", "demo", "--ray-address", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("quire: no Ray cluster answers at '127.0.0.1:1'")
    assert "Traceback" not in done.stderr


def test_a_cluster_that_asks_for_a_token_is_one_line_that_says_how_to_give_it(monkeypatch):
    """The error as Ray raises it where RAY_AUTH_MODE is not set and the cluster has a token."""

    def init(**options: object) -> None:
        cause = RuntimeError("Failed to connect to GCS.\nray.exceptions.AuthenticationError: RPC error\n")
        raise ConnectionError("Failed to connect to Ray cluster at auto") from cause

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(QuireError, match=r"^the Ray cluster at 'auto' asks for a token: .*$"),
        connected("auto"),
    ):
        pass
