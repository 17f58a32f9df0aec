"""Runs shards of rank 1 and up as processes on this machine, which die with their parent."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading

from quire.replicas.errors import QuireError
from quire.replicas.runner.shard_process import ShardSpec, serve_shard

_GRACE_S = 2.0


class LocalProcesses:
    """A launcher: one child process per shard.

    A child lives as long as its standard input is open, which the kernel closes when its parent ends.
    """

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, spec: ShardSpec) -> None:
        child = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE)
        self._children[spec.rank] = child
        assert child.stdin is not None
        pickle.dump(spec, child.stdin)
        child.stdin.flush()

    def failure(self) -> str | None:
        for rank, child in self._children.items():
            if (code := child.poll()) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return (
                    f"shard {rank} (process {child.pid}) {how}; its last words are on this process's stderr"
                )
        return None

    def stop(self) -> None:
        for child in self._children.values():
            assert child.stdin is not None
            child.stdin.close()
        for child in self._children.values():
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()


def _die_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> int:
    """Run the child: read the spec, serve, and print in one line why it ended."""
    spec = pickle.load(sys.stdin.buffer)
    assert isinstance(spec, ShardSpec)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        serve_shard(spec)
    except QuireError as error:
        print(f"shard {spec.rank}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    # Not sys.exit: a thread of the communicator that still waits for a dead peer must not hold us.
    sys.stdout.flush()
    os._exit(main())
