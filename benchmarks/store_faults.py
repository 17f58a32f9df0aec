"""Over a hundred faults in transfers between engines: every request must be answered right, whatever breaks.

    scripts/loopback python benchmarks/store_faults.py [--rounds 4] [--json FILE]

A survivor and, one after another, its victims are replicas of the demo model in processes of their own
(`store_replica.py`). The survivor's pool and host memory are small and always full. A fault strikes the
victim at a message that reaches it or at a chunk that it sends or takes; or it strikes the directory. In one
half of the rounds pages are packed, in the other they are received where they belong. After each:

    answer   the request's tokens and log-probabilities are those of a replica that shares nothing
    books    every page of the survivor is accounted for, and none is in use
    next     the next prompt is fetched from another replica, whole, and answered right

A request that was open on a victim that died is asked again at the survivor, as gateways do.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rows import Row, merge, report
from store_replica import Asked, DirectoryProcess, Remote, Replica
from torch import Tensor

from quire.kvstore.peers.cost import Choice
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import Message
from quire.kvstore.peers.mover import PageMover
from quire.kvstore.wire.transport import Endpoint, Sink, Source, Ticket, Transport
from quire.replicas.config import EngineConfig, PoolConfig, StoreConfig

TOKENS, BLOCKS, NEW_TOKENS = 460, 7, 4
POOL_PAGES, HOST_PAGES = 24, 12
PAGE_BYTES = 101_376  # of the demo model in int8
TIMEOUT_S = 3.0
"""Of a fetch, and so of a lease."""
SETTLED_S = 2 * TIMEOUT_S + 3
_LOOKS = 3
"""Prompts until one at most has been announced in time."""
_LAYOUT_AT, _GENERATION_AT = 40, 72
"""Bytes of the first page header, in the last chunk."""


# ---- the victim's side


class Victim(Replica):
    """A replica that breaks once, where and how it is told."""

    chunk_pages = 2
    """So that a transfer has four chunks, and the headers."""

    def __init__(self, config: EngineConfig, directory: str) -> None:
        super().__init__(config, directory)
        self._armed = ("", "")
        exchange = self._engine._engine.peer.exchange
        handle = exchange.handle

        def heard(sender: ReplicaId, message: Message, now_s: float) -> None:
            self._at(type(message).__name__.lower())
            handle(sender, message, now_s)

        exchange.handle = heard  # type: ignore[method-assign]
        self._mover: PageMover = self._engine._executor._pages._mover
        self._mover._transport = _Struck(self._mover._transport, self._at)
        self._mover._chunk_bytes = self.chunk_pages * self.page_bytes()

    def arm(self, state: str, how: str) -> None:
        self._armed = (state, how)

    def armed(self) -> bool:
        """Whether it is still to break."""
        return bool(self._armed[0])

    def called(self) -> ReplicaId:
        return self.name

    def _at(self, state: str, chunk: Tensor | None = None) -> None:
        if self._armed[0] == state:
            how, self._armed = self._armed[1], ("", "")
            HOW[how](self, chunk)

    def _evict(self, _: Tensor | None) -> None:
        pool = self._engine._engine._pool
        pool.release(pool.allocate(pool.available))

    def _outlast(self, _: Tensor | None) -> None:
        """The lease ends while the shard sleeps, and the pages get other contents."""
        time.sleep(TIMEOUT_S + 0.3)
        self._mover._pool.pool_NB.random_(0, 256)


class InPlace(Victim):
    """A victim whose pages are as large as chunks: sent from and received into the pool."""

    chunk_pages = 1


class _Struck:
    """A transport whose chunks are looked at."""

    def __init__(self, inner: Transport, at: Callable[[str, Tensor | None], None]) -> None:
        self._inner, self._at = inner, at

    @property
    def endpoint(self) -> Endpoint:
        return self._inner.endpoint

    def send(self, peer: Endpoint, ticket: Ticket, source: Source, timeout_s: float) -> Any:
        give = source.read_chunk

        def given(index: int, buffer: Tensor) -> Tensor:
            chunk = give(index, buffer).clone()  # it may be in the pool
            self._at(f"send {index}", chunk)
            return chunk

        source.read_chunk = given  # type: ignore[method-assign]
        return self._inner.send(peer, ticket, source, timeout_s)

    def receive(self, peer: Endpoint, ticket: Ticket, sink: Sink, timeout_s: float) -> Any:
        take = sink.write_chunk

        def taken(index: int, chunk: Tensor) -> None:
            self._at(f"take {index}", chunk)
            take(index, chunk)

        sink.write_chunk = taken  # type: ignore[method-assign]
        return self._inner.receive(peer, ticket, sink, timeout_s)

    def close(self) -> None:
        self._inner.close()


def _flip(at: int, _: Victim, chunk: Tensor | None) -> None:
    assert chunk is not None
    chunk[at] ^= 1


def _end(number: int, *_: object) -> None:
    os.kill(os.getpid(), number)


def _reset(*_: object) -> None:
    """Every TCP connection of this process, links and messages alike."""
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as end:  # it may go by itself
                end.shutdown(socket.SHUT_RDWR)


HOW: dict[str, Callable[[Victim, Tensor | None], None]] = {
    "killed": partial(_end, signal.SIGKILL),
    "stopped": partial(_end, signal.SIGSTOP),
    "corrupt byte": partial(_flip, -1),
    "wrong layout": partial(_flip, _LAYOUT_AT),
    "wrong generation": partial(_flip, _GENERATION_AT),
    "evicted": Victim._evict,
    "rewritten after its lease": Victim._outlast,
    "connections reset": _reset,
}
OWNER_STATES = ("offer", "send 0", "send 3", "done")
RECEIVER_STATES = ("accept", "take 0", "take 3", "released")
LASTING = ("killed", "stopped", "rewritten after its lease")
"""After these the victim is of no more use."""


# ---- the campaign


@dataclass
class Score:
    """Of one kind of fault."""

    faults: int = 0
    wrong_answers: int = 0
    wrong_books: int = 0
    next_failed: int = 0
    slowest_s: float = 0.0


class Campaign:
    """A survivor, the victim at hand, and a judge who shares nothing."""

    def __init__(self, folder: Path, kind: type[Victim]) -> None:
        """`kind`: of the survivor and its victims."""
        self.headers = f"send {-(-BLOCKS // kind.chunk_pages)}"
        self._kind = kind
        self._scores: dict[str, Score] = {}
        self._at = str(folder / "directory")
        self._alone = str(folder / "judges")
        self._rng = random.Random(0)
        self._directory = _directory(self._at)
        self._judges = _directory(self._alone)
        self._config = EngineConfig(
            model="demo",
            kv="int8",
            device="cpu",
            threads_per_shard=1,
            pool=PoolConfig(bytes=POOL_PAGES * PAGE_BYTES, host_bytes=HOST_PAGES * PAGE_BYTES),
            store=StoreConfig(lookup_timeout_s=2.0, fetch_timeout_s=TIMEOUT_S),
        )
        self._judge = Remote(self._config, self._alone)
        self._survivor = Remote(self._config, self._at, kind)
        self._victim, self._spare = self._new(), self._new()
        for replica in (self._judge, self._survivor, self._victim):
            replica.ready()
        assert self._judge.call("page_bytes") == PAGE_BYTES

    def owner(self, state: str, how: str) -> None:
        """The victim holds the prompt that the survivor is asked."""
        prompt = self._prompt()
        self._victim.call("ask", prompt, Choice.RECOMPUTE)
        time.sleep(0.2)  # announced
        self._victim.call("arm", state, how)
        score = self._score(f"owner {how}")
        self._ask(score, prompt)
        if not self._struck():
            raise TimeoutError(f"the victim never came to {state!r}")
        self._aftermath(score, lasting=how in LASTING)

    def receiver(self, state: str, how: str) -> None:
        """The victim is asked what the survivor holds."""
        prompt = self._prompt()
        self._ask(Score(), prompt)
        time.sleep(0.2)
        self._victim.call("arm", state, how)
        self._victim.begin("ask", prompt, Choice.FETCH)
        end_s = time.monotonic() + 2 * TIMEOUT_S
        while not self._down():
            if time.monotonic() > end_s:
                raise TimeoutError(f"the victim never came to {state!r}")
            time.sleep(0.01)
        score = self._score(f"receiver {how}")
        self._ask(score, prompt)
        self._aftermath(score, lasting=True)

    def directory_killed(self) -> None:
        prompt = self._prompt()
        self._victim.call("ask", prompt, Choice.RECOMPUTE)
        time.sleep(0.2)
        self._directory._process.kill()  # type: ignore[attr-defined]
        score = self._score("directory killed")
        self._ask(score, prompt)
        Path(self._at).unlink(missing_ok=True)
        self._directory = _directory(self._at)
        self._aftermath(score, lasting=False)

    def directory_lying(self) -> None:
        books = self._directory.books()  # type: ignore[attr-defined]
        books.lie(self._victim.call("called"))
        score = self._score("directory lying")
        self._ask(score, self._prompt())
        books.lie(None)
        self._aftermath(score, lasting=False)

    def host_memory_full(self) -> None:
        """More prompts than pool and host memory hold; the first is asked again at the end."""
        prompts = [self._prompt() for _ in range(6)]
        score = self._score("host memory full")
        before = self._survivor.call("stats").dropped_blocks
        for prompt in [*prompts, prompts[0]]:
            self._ask(score, prompt)
        assert self._survivor.call("stats").dropped_blocks > before, "it was not full"
        self._aftermath(score, lasting=False)

    @property
    def faults(self) -> int:
        return sum(score.faults for score in self._scores.values())

    def rows(self) -> list[Row]:
        rows = []
        for fault, score in self._scores.items():
            case = f"{fault}, pages {self._kind.chunk_pages} a chunk"
            for metric in ("wrong_answers", "wrong_books", "next_failed"):
                wrong = getattr(score, metric)
                rows.append(Row(case, metric, wrong, "faults", f"of {score.faults}", wrong / score.faults))
            rows.append(
                Row(case, "slowest_answer", score.slowest_s, "s", "timeout", score.slowest_s / TIMEOUT_S)
            )
        return rows

    def close(self) -> None:
        for replica in (self._judge, self._survivor, self._victim, self._spare):
            replica.close()
        for directory in (self._directory, self._judges):
            directory.shutdown()

    def _new(self) -> Remote:
        return Remote(self._config, self._at, self._kind)

    def _prompt(self) -> list[int]:
        return [self._rng.randrange(10, 4096) for _ in range(TOKENS)]

    def _score(self, kind: str) -> Score:
        score = self._scores.setdefault(kind, Score())
        score.faults += 1
        return score

    def _ask(self, score: Score, prompt: list[int]) -> Asked:
        """Of the survivor; the judge says what is right."""
        began = time.monotonic()
        asked: Asked = self._survivor.call("ask", prompt, Choice.FETCH, NEW_TOKENS)
        score.slowest_s = max(score.slowest_s, time.monotonic() - began)
        right: Asked = self._judge.call("ask", prompt, Choice.RECOMPUTE, NEW_TOKENS)
        score.wrong_answers += asked.answer != right.answer
        return asked

    def _down(self) -> bool:
        """Whether the victim is dead or stopped."""
        try:
            return psutil.Process(self._victim.process.pid).status() in ("stopped", "zombie")
        except psutil.NoSuchProcess:
            return True

    def _struck(self) -> bool:
        return self._down() or not self._victim.call("armed")

    def _aftermath(self, score: Score, *, lasting: bool) -> None:
        if lasting:
            self._victim.close()
            self._victim, self._spare = self._spare, self._new()
            self._victim.ready()
        end_s = time.monotonic() + SETTLED_S
        while (used := self._survivor.call("stats").pages_used) and time.monotonic() < end_s:
            time.sleep(0.05)
        score.wrong_books += bool(used)
        self._survivor.call("check")
        for _ in range(_LOOKS):
            prompt = self._prompt()
            self._victim.call("ask", prompt, Choice.RECOMPUTE)
            time.sleep(0.5)  # announced, also to a directory that has just begun
            before = self._survivor.call("stats").fetches
            asked = self._ask(score, prompt)
            if self._survivor.call("stats").fetches > before:  # else it had not been announced yet
                break
        score.next_failed += asked.cached_tokens != BLOCKS * 64


def _directory(address: str) -> DirectoryProcess:
    directory = DirectoryProcess(address)
    directory.start()
    return directory


def a_round(campaign: Campaign) -> None:
    """27 faults."""
    for how in ("killed", "stopped"):
        for state in OWNER_STATES:
            campaign.owner(state, how)
        for state in RECEIVER_STATES:
            campaign.receiver(state, how)
    for how, state in (
        ("corrupt byte", "send 1"),
        ("corrupt byte", "send 3"),
        ("wrong layout", campaign.headers),
        ("wrong generation", campaign.headers),
        ("evicted", "offer"),
        ("rewritten after its lease", "send 0"),
        ("connections reset", "send 1"),
        ("connections reset", "done"),
    ):
        campaign.owner(state, how)
    for fault in (campaign.directory_killed, campaign.directory_lying, campaign.host_memory_full):
        fault()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    faults = 0
    for kind, rounds in ((Victim, args.rounds - args.rounds // 2), (InPlace, args.rounds // 2)):
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(Path(folder), kind)
            try:
                for _ in range(rounds):
                    a_round(campaign)
            finally:
                campaign.close()
        rows += campaign.rows()
        faults += campaign.faults
    report(rows, None)
    if args.json:
        merge(rows, args.json)
    wrong = [row for row in rows if row.unit == "faults" and row.value]
    print(f"{faults} faults, {len(wrong)} figures that should be 0 and are not")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
