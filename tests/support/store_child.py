"""A replica of the store in a process of its own, and this process's one beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil
from forkserver import forkserver
from store_peers import StorePeer, peer_process

from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import Message, decode_message, encode_message

CHILD = ReplicaId("child")


@dataclass
class Child:
    """A replica in a process of its own, and this process's one beside it."""

    process: BaseProcess
    control: Connection
    me: StorePeer
    said: list[tuple[object, ...]]

    def tell(self, *what: object) -> None:
        self.control.send(what)

    def drive(self, until: Callable[[], bool], limit_s: float = 60) -> None:
        """Carry messages between the two until something is true here."""
        self.me.send = lambda to, message: self._carry(message)
        end_s = time.monotonic() + limit_s
        while not until():
            assert time.monotonic() < end_s, "it did not happen"
            self.me.turn()
            while (said := self._hear()) is not None:
                if said[0] == "message":
                    self.me.peer.on_message(CHILD, decode_message(said[1]))
                else:
                    self.said.append(said)
            time.sleep(0.001)

    def _carry(self, message: Message) -> None:
        try:
            self.tell("message", encode_message(message))
        except BrokenPipeError:
            self._gone()

    def _hear(self) -> tuple[object, ...] | None:
        try:
            return self.control.recv() if self.control.poll(0) else None
        except (EOFError, ConnectionResetError):
            return self._gone()

    def _gone(self) -> None:
        self.me.peer.on_peer_gone(CHILD)


@contextmanager
def child(
    me: StorePeer,
    kv: str = "int8",
    tp: int = 1,
    device: str = "cpu",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Child]:
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(target=peer_process, args=(theirs, kv, tp, device, environment), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(60)
    assert ours.recv() == "ready"
    try:
        yield Child(process, ours, me, [])
    finally:
        process.kill()
        process.join()
        ours.close()


def ended(child: BaseProcess) -> bool:
    """It was killed, or it is stopped."""
    try:
        return psutil.Process(child.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
