"""The books of transfers: without tensors or threads, every order of events, on both sides."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.books.pool import PagePool
from quire.kvstore.peers.exchange import Exchange, ExchangeConfig, FetchDone, RunOrder, SendMessage
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.peers.messages import (
    Accept,
    Done,
    Message,
    Moved,
    Order,
    ReceivePages,
    Refuse,
    Released,
    SendPages,
)
from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.transport import Endpoint

SPACE, HEADS = b"\1" * 32, 4
CONFIG = ExchangeConfig(timeout_s=5, max_fetches=3, max_loans=3, max_lent_share=1.0)


def keys_of(count: int, seed: int = 0) -> list[BlockKey]:
    return extend_chain(KeySpace(b"l", b"m", b"t").root(str(seed)), list(range(16 * count)), 16)


@dataclass
class Side:
    name: ReplicaId
    pool: PagePool
    exchange: Exchange
    tp: int
    fetched: list[FetchDone] = field(default_factory=list)

    @staticmethod
    def of(name: str, pages: int = 16, tp: int = 1, space: bytes = SPACE, **config: object) -> Side:
        pool = PagePool(pages)
        ends = [Endpoint(f"{name}{r}", "h", r) for r in range(tp)]
        exchange = Exchange(
            pool, space, ends, ExchangeConfig(**config) if config else CONFIG, kv_heads=HEADS, bf16_ratio=2.0
        )
        return Side(ReplicaId(name), pool, exchange, tp)

    def cache(self, keys: list[BlockKey]) -> None:
        pages = self.pool.allocate(len(keys))
        for key, page in zip(keys, pages, strict=True):
            self.pool.publish(key, page)
        self.pool.release(pages)

    def take(self) -> tuple[list[Message], list[Order]]:
        effects = self.exchange.take()
        self.fetched += [e for e in effects if isinstance(e, FetchDone)]
        says = [e.message for e in effects if isinstance(e, SendMessage)]
        return says, [e.order for e in effects if isinstance(e, RunOrder)]

    def report(self, order: Order, rank: int = 0, failure: Cause | None = None, now_s: float = 0) -> None:
        received = isinstance(order, ReceivePages)
        size = 0 if failure else 100 * len(order.pages)
        self.exchange.moved(Moved(order.transfer, rank, received, 0.1, size, failure), now_s)

    def check(self) -> None:
        self.pool.check(self.exchange.held_pages())


@pytest.fixture
def sides() -> tuple[Side, Side]:
    owner, receiver = Side.of("owner"), Side.of("receiver")
    owner.cache(keys_of(4))
    return owner, receiver


def until_accept(owner: Side, receiver: Side, keys: list[BlockKey]) -> tuple[Accept, SendPages]:
    receiver.exchange.fetch(owner.name, keys, 0)
    ((offer,), _) = receiver.take()
    owner.exchange.handle(receiver.name, offer, 0)
    (accept,), (send,) = owner.take()
    assert isinstance(accept, Accept)
    assert isinstance(send, SendPages)
    return accept, send


def until_received(owner: Side, receiver: Side, keys: list[BlockKey]) -> ReceivePages:
    accept, send = until_accept(owner, receiver, keys)
    receiver.exchange.handle(owner.name, accept, 1)
    ((), (receive,)) = receiver.take()
    assert isinstance(receive, ReceivePages)
    assert (receive.keys, receive.generations) == (send.keys, send.generations)
    return receive


def test_a_fetch_publishes_what_the_owner_held_till_the_end(sides):
    owner, receiver = sides
    keys = keys_of(6)  # two of them the owner does not have
    receive = until_received(owner, receiver, keys)
    assert receive.keys == tuple(keys[:4])
    assert owner.pool.used == 4
    assert receiver.pool.lookup(keys) == (0, 0)  # arriving is not enough
    receiver.report(receive)
    (done,), _ = receiver.take()
    assert receiver.pool.lookup(keys) == (0, 0)
    owner.exchange.handle(receiver.name, done, 2)
    (released,), _ = owner.take()
    receiver.exchange.handle(owner.name, released, 2)
    receiver.take()
    assert receiver.pool.lookup(keys) == (4, 4)
    (fetched,) = receiver.fetched
    assert (fetched.blocks, fetched.bytes_moved, fetched.seconds, fetched.failure) == (4, 400, 2, None)
    assert (receiver.exchange.stats.bytes_saved, receiver.exchange.stats.blocks_fetched) == (400, 4)
    assert owner.pool.used == receiver.pool.used == 0
    owner.check()
    receiver.check()


def test_all_shards_must_have_received(sides):
    owner, receiver = sides[0], Side.of("receiver", tp=4)
    receive = until_received(owner, receiver, keys_of(4))
    for rank in (2, 0, 3):
        receiver.report(receive, rank)
        receiver.report(receive, rank)  # a report twice counts once
        assert receiver.take() == ([], [])
    receiver.report(receive, 1)
    assert receiver.take() == ([Done(receive.transfer)], [])


def test_a_lease_that_did_not_hold_publishes_nothing(sides):
    owner, receiver = sides
    receive = until_received(owner, receiver, keys_of(4))
    owner.exchange.expire(5.5)
    owner.pool.allocate(16)  # the pages are rewritten
    receiver.report(receive)
    (done,), _ = receiver.take()
    owner.exchange.handle(receiver.name, done, 5.6)
    (released,), _ = owner.take()
    assert released == Released(receive.transfer, False)
    receiver.exchange.handle(owner.name, released, 5.6)
    receiver.take()
    assert receiver.fetched[0].failure is Cause.LEASE
    assert receiver.pool.free == 16
    assert owner.exchange.stats.loan_failures == {Cause.LEASE: 1}


def test_a_block_withdrawn_while_it_is_lent_is_not_published(sides):
    owner, receiver = sides
    held = owner.pool.share(keys_of(4))
    receive = until_received(owner, receiver, keys_of(4))
    owner.pool.withdraw(held)
    receiver.report(receive)
    (done,), _ = receiver.take()
    owner.exchange.handle(receiver.name, done, 2)
    assert owner.take()[0] == [Released(receive.transfer, False)]


def test_pages_of_a_failed_fetch_come_back_when_the_last_shard_has_let_go(sides):
    owner, receiver = sides[0], Side.of("receiver", tp=2)
    receive = until_received(owner, receiver, keys_of(4))
    receiver.report(receive, 0, Cause.CHECKSUM)
    says, _ = receiver.take()
    assert says == [Done(receive.transfer)]
    assert receiver.fetched[0].failure is Cause.CHECKSUM  # the engine hears of it at once
    assert receiver.pool.used == 4  # rank 1 may still write
    receiver.check()
    receiver.report(receive, 1)
    assert receiver.take() == ([], [])
    assert receiver.pool.free == 16
    assert len(receiver.fetched) == 1


@pytest.mark.parametrize("state", ["offered", "receiving", "confirming"])
@pytest.mark.parametrize("end", ["deadline", "gone"])
def test_silence_or_death_of_the_owner_ends_a_fetch_in_any_state(sides, state, end):
    owner, receiver = sides
    receive = None
    if state == "offered":
        receiver.exchange.fetch(owner.name, keys_of(4), 0)
    else:
        receive = until_received(owner, receiver, keys_of(4))
    if receive and state == "confirming":
        receiver.report(receive)
    receiver.take()
    assert receiver.exchange.next_deadline_s == 5
    receiver.exchange.expire(5)
    assert not receiver.fetched
    if end == "deadline":
        receiver.exchange.expire(5.01)
    else:
        receiver.exchange.peer_gone(owner.name, 2)
    receiver.take()
    assert receiver.fetched[0].failure is (Cause.DEADLINE if end == "deadline" else Cause.PEER)
    if state == "receiving":
        assert receiver.pool.used == 4
        receiver.report(receive, failure=Cause.DEADLINE)
    assert receiver.pool.free == 16
    receiver.check()
    receiver.exchange.handle(owner.name, Released(TransferId(1), True), 6)  # too late
    assert receiver.take() == ([], [])
    assert len(receiver.fetched) == 1


@pytest.mark.parametrize("end", ["deadline", "gone", "done"])
def test_an_owner_gets_its_pages_back_however_the_receiver_ends(sides, end):
    owner, receiver = sides
    accept, _ = until_accept(owner, receiver, keys_of(4))
    assert owner.pool.used == 4
    if end == "deadline":
        owner.exchange.expire(5.01)
    elif end == "gone":
        owner.exchange.peer_gone(receiver.name, 1)
    else:
        owner.exchange.handle(receiver.name, Done(accept.transfer), 1)
    owner.check()
    assert owner.pool.cached == 4
    assert owner.exchange.next_deadline_s is None


def test_an_answer_that_comes_too_late_lets_the_owner_go(sides):
    owner, receiver = sides
    accept, _ = until_accept(owner, receiver, keys_of(4))
    receiver.exchange.expire(5.01)
    receiver.take()
    receiver.exchange.handle(owner.name, accept, 6)
    assert receiver.take() == ([Done(accept.transfer)], [])


def test_nobody_but_the_owner_can_answer(sides):
    owner, receiver = sides
    accept, _ = until_accept(owner, receiver, keys_of(4))
    receiver.exchange.handle(ReplicaId("other"), accept, 1)
    assert receiver.take() == ([Done(accept.transfer)], [])
    receiver.exchange.handle(owner.name, accept, 1)
    assert len(receiver.take()[1]) == 1


def refusal(owner: Side, receiver: Side, keys: list[BlockKey]) -> Cause:
    receiver.exchange.fetch(owner.name, keys, 0)
    (offer,), _ = receiver.take()
    owner.exchange.handle(receiver.name, offer, 0)
    (refuse,), orders = owner.take()
    assert isinstance(refuse, Refuse)
    assert not orders
    receiver.exchange.handle(owner.name, refuse, 1)
    assert receiver.take() == ([], [])
    assert receiver.fetched[-1].failure is refuse.cause
    receiver.check()
    owner.check()
    return refuse.cause


def test_an_owner_refuses_what_it_does_not_hold_and_other_models(sides):
    owner, receiver = sides
    assert refusal(owner, receiver, keys_of(2, seed=1)) is Cause.REFUSED
    assert refusal(owner, Side.of("r", space=b"\2" * 32), keys_of(4)) is Cause.REFUSED
    assert refusal(owner, Side.of("r", tp=3), keys_of(4)) is Cause.REFUSED


def test_an_owner_lends_a_share_of_its_pages_and_no_more():
    owner = Side.of("owner", pages=8, max_lent_share=0.5)
    owner.cache(keys_of(6))
    accept, _ = until_accept(owner, Side.of("one"), keys_of(6))
    assert len(accept.generations) == 4
    assert refusal(owner, Side.of("two"), keys_of(6)) is Cause.BUSY


def test_a_receiver_without_room_lets_the_owner_go(sides):
    owner, receiver = sides[0], Side.of("receiver", pages=3)
    accept, _ = until_accept(owner, receiver, keys_of(4))
    receiver.exchange.handle(owner.name, accept, 1)
    assert receiver.take() == ([Done(accept.transfer)], [])
    assert receiver.fetched[0].failure is Cause.NO_PAGES


def test_fetches_are_bounded(sides):
    receiver = sides[1]
    for _ in range(3):
        receiver.exchange.fetch(ReplicaId("x"), keys_of(1), 0)
    with pytest.raises(TransferFailed, match="3 fetches are under way"):
        receiver.exchange.fetch(ReplicaId("x"), keys_of(1), 0)


@pytest.mark.parametrize("seed", range(6))
def test_in_any_order_of_events_every_fetch_ends_once_and_no_page_is_lost(seed):
    """Messages are lost and overtake each other, shards fail, peers vanish, pages are rewritten."""
    rng = random.Random(seed)
    sides = {s.name: s for s in (Side.of("a"), Side.of("b", tp=2), Side.of("c", tp=4))}
    wire: list[tuple[Side, Side, Message]] = []
    work: list[tuple[Side, Order, int]] = []
    asked, now = 0, 0.0
    for turn in range(6000):
        now += rng.random() * 0.04
        side, other = rng.sample(list(sides.values()), 2)
        keys = keys_of(rng.randint(1, 6), rng.randint(0, 3))
        what = rng.random()
        if what < 0.05:
            missing = len(keys) - side.pool.lookup(keys)[0]
            if missing and side.pool.available >= missing:
                held = side.pool.share(keys)
                held += side.pool.allocate(min(missing, side.pool.available))
                for key, page in zip(keys, held, strict=False):
                    side.pool.publish(key, page)
                side.pool.release(held)
        elif what < 0.12:
            with suppress(TransferFailed):  # too many at once
                side.exchange.fetch(other.name, keys, now)
                asked += 1
        elif what < 0.75 and wire:
            sender, receiver, message = wire.pop(rng.randrange(len(wire)))
            if rng.random() < 0.9:
                receiver.exchange.handle(sender.name, message, now)
        elif what < 0.98 and work:
            shard, order, rank = work.pop(rng.randrange(len(work)))
            shard.report(order, rank, rng.choice([None, None, None, Cause.PEER]), now)
        elif what > 0.999:
            side.pool.expire_leases(now + 100)  # a process that was stopped for long
        elif what > 0.996:
            side.exchange.peer_gone(other.name, now)
        for s in sides.values():
            s.exchange.expire(now)
            for effect in s.exchange.take():
                match effect:
                    case SendMessage(to, message):
                        wire.append((s, sides[to], message))
                    case RunOrder(order):
                        work += [(s, order, rank) for rank in range(s.tp)]
                    case FetchDone():
                        s.fetched.append(effect)
            if turn % 50 == 0:
                s.check()
    for shard, order, rank in work:
        shard.report(order, rank, None, now)
    for s in sides.values():
        s.exchange.expire(now + 100)
        s.fetched += [e for e in s.exchange.take() if isinstance(e, FetchDone)]
        s.check()
        assert s.pool.used == 0
    done = [f for s in sides.values() for f in s.fetched]
    assert len(done) == asked > 100
    assert sum(f.failure is None for f in done) > 10
    assert {f.failure for f in done} >= {Cause.DEADLINE, Cause.REFUSED, Cause.PEER}
