"""What the commands of a client print, and how they end when an answer does not."""

import os
import pty
import signal
import subprocess
import sys

import pytest
from gateway_thread import gateway_thread
from served_app import quire

from quire.replicas.errors import Status
from quire.replicas.request import Failure

QUIRE = [sys.executable, "-m", "quire.cluster.cli.main"]


def _echo(engine, request):
    engine.say(request, "fine", 4, last=True)


def _cut(engine, request):
    """Begin an answer; the replica is then gone."""
    engine.say(request, "half", 4)
    engine.send(Failure(request.id, Status.UNAVAILABLE, "shard 1 is gone"))


def _unending(engine, request):
    engine.say(request, "half", 4)


def test_a_chat_from_a_pipe_prints_answers_only():
    with gateway_thread(_echo) as address:
        done = quire("chat", "--address", address, stdin="Hello!\n\nAnd you?\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\nfine\n", "")


def test_a_chat_at_a_terminal_prompts():
    ours, theirs = pty.openpty()
    with gateway_thread(_echo) as address:
        process = subprocess.Popen(
            [*QUIRE, "chat", "--address", address],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.write(ours, b"Hello!\n\x04")
        said, asked = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert (said, asked) == (b"fine\n", b"you> you> \n")


def test_a_line_that_is_not_utf8_is_named():
    with gateway_thread(_echo) as address:
        done = subprocess.run(
            [*QUIRE, "chat", "--address", address], input=b"\xff\n", capture_output=True, timeout=120
        )
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"quire: standard input is not UTF-8")


def test_an_answer_that_is_cut_off_ends_with_a_newline_and_a_hint_at_the_seed():
    with gateway_thread(_cut) as address:
        done = quire("generate", "Hello!", "--address", address, "--temperature", "1")
    assert (done.returncode, done.stdout) == (1, "half\n")
    (line,) = done.stderr.splitlines()
    assert "shard 1 is gone" in line
    assert "with --seed" in line


@pytest.mark.parametrize("command", [("generate", "Hello!"), ("chat", "Hello!")])
def test_an_interrupt_ends_an_answer_with_130_and_a_newline(command):
    with gateway_thread(_unending) as address:
        process = subprocess.Popen(
            [*QUIRE, *command, "--address", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.read(4) == b"half"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert (process.returncode, rest, errors.strip()) == (130, b"\n", b"")
