"""Signals end a command that starts something, whatever its main thread is doing."""

import signal
import subprocess
import sys

import pytest

COMMAND = """
import ctypes, sys, time
from quire.cluster.cli.interrupts import Interrupts

interrupts = Interrupts(lambda words: print(words, file=sys.stderr, flush=True))
if "orderly" in sys.argv:
    interrupts.orderly()
try:
    print("ready", flush=True)
    if "native" in sys.argv:  # as in Ray: a wait that a signal does not end
        libc = ctypes.CDLL(None)
        while libc.sleep(600):
            libc.sleep(600)
    else:
        time.sleep(600)
except KeyboardInterrupt:
    print("taking down", flush=True)
    time.sleep(600 if "slow" in sys.argv else 0)
    print("gone", flush=True)
    sys.exit(3)
"""


def ended(*words, signals, number):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if signals == 2:
        assert process.stdout.readline() == "taking down\n"
        process.send_signal(number)
    said, complaint = process.communicate(timeout=60)
    return process.returncode, said, complaint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_anything_runs_a_signal_ends_the_process_even_in_native_code(number):
    assert ended("native", signals=1, number=number) == (130, "", "ended\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_then_the_first_takes_it_down_in_order(number):
    code, said, _ = ended("orderly", signals=1, number=number)
    assert (code, said) == (3, "taking down\ngone\n")


def test_and_the_second_does_not_wait():
    code, said, complaint = ended("orderly", "slow", signals=2, number=signal.SIGINT)
    assert (code, said) == (130, "")
    assert complaint.splitlines()[-1] == "ended"
