"""Engines that fetch each other's blocks: the same answers as computing, and computing whenever it fails."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import pytest
from neighbourhood import Resident, Town, answer
from recall import mixed_prompts
from reweighed import reweighed

from quire.kvstore.peers.cost import CostConfig, CostModel
from quire.kvstore.peers.directory import Holder
from quire.kvstore.peers.messages import Accept, Done, Offer, Released
from quire.kvstore.wire.failures import Cause
from quire.replicas.config import EngineConfig, PoolConfig, StoreConfig
from quire.replicas.engine.load import load_tokenizer
from quire.replicas.request import Request, RequestId, SamplingParams

TOKENIZER = load_tokenizer("demo")
PROMPT, WARM_UP, OTHER = mixed_prompts(TOKENIZER, [700, 150, 500])
BLOCKS = (len(PROMPT) - 1) // 64


def config(
    kv: str = "int8", tp: int = 1, pool_bytes: int = 24 << 20, model: str = "demo", **store: float
) -> EngineConfig:
    return EngineConfig(
        model=model,
        kv=kv,
        tp=tp,
        device="cpu",
        threads_per_shard=1,
        pool=PoolConfig(bytes=pool_bytes // tp),
        store=StoreConfig(**{"lookup_timeout_s": 30.0, "fetch_timeout_s": 60.0, **store}),
    )


def sharing_pair(a: EngineConfig, b: EngineConfig) -> tuple[Resident, Resident]:
    """Both have computed a prompt of their own: only then is there a rate to compare with."""
    town = Town()
    residents = Resident(town, "a", a), Resident(town, "b", b)
    for resident in residents:
        resident.ask(WARM_UP, tenant=str(resident.way.me))
    return residents


def fetched(resident: Resident) -> int:
    return resident.engine._engine.peer.exchange.stats.blocks_fetched


def settled(*residents: Resident) -> None:
    """Once leases and late reports have ended, no page is used and the books are right."""
    deadline = time.monotonic() + 60
    while any(resident.stats.pages_used for resident in residents):
        assert time.monotonic() < deadline, "a page is still held"
        time.sleep(0.02)
    for resident in residents:
        resident.engine.check()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "fp8", "int8", "int4", "k8v4"])
def test_a_prefix_computed_by_one_is_used_by_the_other_with_the_same_logits(kv):
    a, b = sharing_pair(config(kv), config(kv))
    with a, b:
        computed = a.ask(PROMPT)
        got = b.ask(PROMPT)
        recomputed = b.ask(PROMPT, tenant="another")
        assert answer(got) == answer(computed) == answer(recomputed)
        assert got[-1].usage.cached_tokens == BLOCKS * 64
        assert fetched(b) == BLOCKS
        stats = b.engine.stats()
        assert stats.remote_tokens == stats.cached_tokens == BLOCKS * 64
        assert (stats.fetches, stats.fetch_choices["fetch"], stats.fetch_failures) == (1, 1, {})
        b.ask(PROMPT)  # again: they were here already
        assert b.engine.stats().remote_tokens == BLOCKS * 64
        stats, layout = b.engine._engine.peer.exchange.stats, b.engine._executor.shard.layout
        assert stats.bytes_received == BLOCKS * layout.page_bytes
        for resident in (a, b):
            resident.engine.check()
            assert resident.stats.pages_used == 0


def test_a_prompt_is_fetched_from_the_replica_that_was_told_to_compute_it():
    a, b = sharing_pair(config("int4"), config("int4"))
    with a, b:
        b.way.looks = False  # the directory need not know yet
        a.ask(PROMPT, new_tokens=1)
        split = b.ask(PROMPT, computed_by=a.way.me)
        assert split[-1].usage.cached_tokens == BLOCKS * 64
        assert b.stats.fetch_choices == {"fetch": 0, "recompute": 0}  # it was not the cost model's to choose
        assert answer(split) == answer(b.ask(PROMPT, tenant="another"))
        b.engine.check()


def test_a_prompt_whose_computer_is_gone_or_has_forgotten_is_computed():
    a, b = sharing_pair(config(), config())
    with a, b:
        assert b.ask(PROMPT, computed_by=a.way.me)[-1].usage.cached_tokens == 0
        computed = b.ask(OTHER, tenant="another")
        a.move_out()
        assert answer(b.ask(OTHER, computed_by=a.way.me)) == answer(computed)
        b.engine.check()


def test_replicas_of_different_sizes_share_too():
    """Blocks go from one shard to two, from those to two others, and from those to one again."""
    with ExitStack() as stack:
        town = Town()
        replicas = [
            stack.enter_context(Resident(town, f"r{i}", config("int4", tp)))
            for i, tp in enumerate((1, 2, 2, 1))
        ]
        for replica in replicas:
            replica.ask(WARM_UP, tenant=str(replica.way.me))
        computed = replicas[0].ask(PROMPT)
        for owner, receiver in pairwise(replicas):
            got = receiver.ask(PROMPT)
            assert [token for token, _ in answer(got)] == [token for token, _ in answer(computed)]
            assert fetched(receiver) == BLOCKS
            receiver.engine.check()
            owner.move_out()


def test_what_is_fetched_once_is_lent_on():
    a, b = sharing_pair(config(), config())
    with a, b, Resident(a.way.town, "c", config()) as c:
        c.ask(WARM_UP, tenant="c")
        computed = a.ask(PROMPT)
        b.ask(PROMPT)
        a.move_out()
        assert answer(c.ask(PROMPT)) == answer(computed)
        assert fetched(c) == BLOCKS


def test_tenants_do_not_see_each_others_blocks():
    a, b = sharing_pair(config(), config())
    with a, b:
        a.ask(PROMPT, tenant="one")
        assert b.ask(PROMPT, tenant="two")[-1].usage.cached_tokens == 0
        assert fetched(b) == 0


def test_other_formats_are_other_blocks():
    a, b = sharing_pair(config("int8"), config("int4"))
    with a, b:
        a.ask(PROMPT)
        assert b.ask(PROMPT)[-1].usage.cached_tokens == 0


def test_other_weights_are_other_blocks(tmp_path):
    """As during an upgrade: neither what leaving replicas offer nor what others computed is taken."""
    a, b = sharing_pair(config(), config(model=str(reweighed(tmp_path))))
    with a, b:
        computed = a.ask(PROMPT)
        a.engine.hand_over((b.way.me,), within_s=5.0)
        assert b.stats.fetches == 0
        got = b.ask(PROMPT, computed_by=a.way.me)
        assert got[-1].usage.cached_tokens == fetched(b) == 0
        assert b.stats.fetch_failures == {Cause.REFUSED: 1}
        assert answer(got) != answer(computed)


def test_a_few_missing_blocks_are_not_asked_for():
    a, b = sharing_pair(config(), config(min_fetch_blocks=20))
    with a, b:
        a.ask(PROMPT)
        assert b.ask(PROMPT)[-1].usage.cached_tokens == 0


@pytest.mark.parametrize("lost", [Offer, Accept, Done, Released])
def test_a_lost_message_costs_the_fetch_and_nothing_else(lost):
    a, b = sharing_pair(config(fetch_timeout_s=1.0), config(fetch_timeout_s=1.0))
    with a, b:
        computed = a.ask(PROMPT)
        for resident in (a, b):
            resident.way.drops = lambda message: isinstance(message, lost)
        assert answer(b.ask(PROMPT)) == answer(computed)
        assert fetched(b) == 0
        assert b.engine._engine.peer.exchange.stats.fetch_failures == {Cause.DEADLINE: 1}
        for resident in (a, b):
            resident.way.drops = lambda message: False
        settled(a, b)


def test_an_owner_that_is_gone_is_not_waited_for():
    a, b = sharing_pair(config(), config())
    with a, b:
        computed = a.ask(PROMPT)
        a.move_out()
        assert answer(b.ask(PROMPT)) == answer(computed)
        assert b.engine._engine.peer.exchange.stats.fetch_failures == {Cause.PEER: 1}


def test_a_directory_that_lies_costs_one_refusal():
    a, b = sharing_pair(config(), config())
    with a, b:
        b.way.town.directory.lookup = lambda chain: (Holder(a.way.me, len(chain)),)
        assert b.ask(PROMPT)[-1].usage.cached_tokens == 0
        assert b.engine._engine.peer.exchange.stats.fetch_failures == {Cause.REFUSED: 1}


def test_a_directory_that_does_not_answer_is_not_waited_for():
    a, b = sharing_pair(config(), config(lookup_timeout_s=0.2))
    with a, b:
        computed = a.ask(PROMPT)
        b.way.looks = False
        assert answer(b.ask(PROMPT)) == answer(computed)
        assert fetched(b) == 0


def test_requests_for_one_prefix_share_one_fetch():
    a, b = sharing_pair(config(), config())
    with a, b:
        a.ask(PROMPT)
        for name in ("x", "y", "z"):
            sampling = SamplingParams(max_tokens=2, ignore_eos=True)
            b.engine.submit(Request(id=RequestId(name), prompt=tuple(PROMPT), sampling=sampling))
        b.ask(PROMPT)
        assert b.engine._engine.peer.exchange.stats.fetches == 1
        assert fetched(b) == BLOCKS


def test_a_prompt_is_not_queued_behind_itself():
    a, b = sharing_pair(config(), config())
    with a, b:
        a.ask(PROMPT)
        cost, queued = b.engine._engine.waits._cost, []
        decide = cost.decide
        cost.decide = lambda *args: queued.append(args[3]) or decide(*args)
        b.ask(PROMPT)
        assert queued == [0]


def test_evicted_blocks_are_not_offered_any_more():
    a, b = sharing_pair(config(pool_bytes=13 * 101376), config())
    with a, b:
        a.ask(PROMPT)
        a.ask(OTHER, tenant="else")
        assert b.ask(PROMPT)[-1].usage.cached_tokens < BLOCKS * 64


@pytest.mark.parametrize("hands_over", [False, True])
def test_a_replica_that_leaves_hands_its_blocks_over(hands_over):
    a, b = sharing_pair(config(), config())
    prompts = mixed_prompts(TOKENIZER, [500, 400, 600, 450], seed=5)
    with a, b, Resident(a.way.town, "c", config()) as c:
        c.ask(WARM_UP, tenant="c")
        computed = [answer(a.ask(prompt)) for prompt in prompts]
        if hands_over:
            a.engine.hand_over((b.way.me, c.way.me), within_s=60.0)
        a.move_out()
        found = [(b.ask(prompt), c.ask(prompt)) for prompt in prompts]
        for outputs, right in zip(found, computed, strict=True):
            assert answer(outputs[0]) == answer(outputs[1]) == right
        if hands_over:  # each block lies at one of the two; whether the other fetches it, is its to weigh
            cached = [max(one[-1].usage.cached_tokens for one in outputs) for outputs in found]
            assert cached == [(len(prompt) - 1) // 64 * 64 for prompt in prompts]
        else:
            assert [outputs[0][-1].usage.cached_tokens for outputs in found] == [0] * 4
        for resident in (b, c):
            resident.engine.check()


def test_an_heir_that_is_slow_to_hear_of_it_is_waited_for():
    a, b = sharing_pair(config(), config())
    with a, b:
        a.ask(PROMPT)
        with b.engine._stepping:
            leaving = threading.Thread(target=a.engine.hand_over, args=((b.way.me,), 30.0))
            leaving.start()
            time.sleep(1.5)
            assert leaving.is_alive()
        leaving.join(30)
        assert not leaving.is_alive()
        assert fetched(b) >= BLOCKS


@pytest.mark.parametrize("heir", ["gone", "shut down", "silent", "leaving too"])
def test_a_leaver_waits_for_nobody_who_takes_nothing(heir):
    a, b = sharing_pair(config(), config())
    with a, b:
        a.ask(PROMPT)
        match heir:
            case "gone":
                b.move_out()
            case "shut down":
                b.engine.close()
            case "silent":
                a.way.drops = lambda message: True
            case "leaving too":
                b.engine.hand_over((a.way.me,), within_s=30.0)
                before = fetched(b)
        started, within_s = time.monotonic(), 1.0 if heir == "silent" else 60.0
        a.engine.hand_over((b.way.me,), within_s)
        took_s = time.monotonic() - started
        assert (took_s >= within_s) == (heir == "silent")
        if heir == "leaving too":
            assert fetched(b) == before


def test_what_is_handed_over_takes_free_pages_only():
    a, b = sharing_pair(config(), config(pool_bytes=13 * 101376))
    with a, b:
        mine = b.ask(OTHER)
        a.ask(PROMPT)
        a.engine.hand_over((b.way.me,), within_s=5.0)
        again = b.ask(OTHER)
        assert again[-1].usage.cached_tokens == (len(OTHER) - 1) // 64 * 64
        assert answer(again) == answer(mine)


@pytest.mark.parametrize("seed", range(1))
def test_answers_stay_right_whatever_is_lost(seed, monkeypatch):
    """Messages vanish, owners move out without a word and others in, all at random."""
    eager = partial(CostModel, CostConfig(retry_s=0.0))  # or one failure would keep a link out for long
    monkeypatch.setattr("quire.replicas.engine.prefix_waits.CostModel", eager)
    rng = random.Random(seed)
    prompts = mixed_prompts(TOKENIZER, [300, 400, 500, 600], seed=9)
    quick = config(fetch_timeout_s=0.4, lookup_timeout_s=0.4)
    town = Town()
    residents = [Resident(town, f"r{i}", quick) for i in range(3)]
    faults = came = 0

    def drops(message):
        nonlocal faults
        lost = rng.random() < 0.12
        faults += lost
        return lost

    try:
        right = [answer(residents[0].ask(prompt, tenant="alone")) for prompt in prompts]
        for resident in residents:
            resident.ask(WARM_UP, tenant=str(resident.way.me))
            resident.way.drops = drops
        for turn in range(40):
            if turn % 10 == 9:
                faults += 1
                leaver = residents.pop(rng.randrange(3))
                came += fetched(leaver)
                leaver.move_out()
                residents.append(Resident(town, f"r{turn}", quick))
                residents[-1].ask(WARM_UP, tenant=f"r{turn}")
                residents[-1].way.drops = drops
            which = rng.randrange(4)
            outputs = rng.choice(residents).ask(prompts[which], tenant=f"t{turn // 10}")
            assert answer(outputs) == right[which]
        assert faults > 5
        assert came + sum(map(fetched, residents)) > 0
        settled(*residents)
    finally:
        for resident in residents:
            resident.move_out()
