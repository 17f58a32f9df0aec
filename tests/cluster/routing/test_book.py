"""One gateway's books: what it sent, what it hears, what follows for the next request."""

from dataclasses import replace

import pytest

from quire.cluster.routing.book import Routes
from quire.cluster.routing.score import Reason
from quire.kvstore.books.keys import KeySpace
from quire.replicas.engine.load_report import LoadReport

KEYS = KeySpace(b"layout", b"weights", b"transforms")
ADDRESSES = {"a": "127.0.0.1:1", "b": "127.0.0.1:2", "c": "127.0.0.1:3"}
IDLE = LoadReport(
    max_running=16, pages_total=200, pages_free=200, prefill_s_per_token=1e-3, step_s=0.01, hold_s=1.0
)
PROMPT = list(range(1000, 1640))


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def routes(clock):
    routes = Routes(clock=clock, seed=0)
    for name in ADDRESSES:
        routes.joined(name, KEYS, 64)
        routes.heard(name, IDLE, 0)
    return routes


def sent(routes, prompt=PROMPT, tenant=""):
    """A request that Serve let go where it was to go."""
    route = routes.route(prompt, tenant)
    route.reserved(route.rank(ADDRESSES)[0])
    return route


def done(route, output=()):
    route.answered()
    route.ended(output)


def test_the_same_prompt_goes_where_it_was(routes):
    first = sent(routes)
    done(first)
    for _ in range(5):
        again = sent(routes)
        assert (again.replica_id, again.decision.reason) == (first.replica_id, Reason.PREFIX)
        assert again.decision.predicted.cached_tokens == 9 * 64  # the last token is computed in any case
        done(again)


def test_another_tenant_finds_nothing(routes):
    done(sent(routes))
    assert sent(routes, tenant="other").decision.predicted.cached_tokens == 0


def test_an_answer_is_part_of_the_next_turns_prefix(routes):
    first = sent(routes)
    answer = list(range(200))
    done(first, answer)
    turn = sent(routes, PROMPT + answer + [7] * 40)
    assert turn.replica_id == first.replica_id
    assert turn.decision.predicted.cached_tokens == (640 + 199) // 64 * 64


def test_different_prompts_spread(routes):
    went = {sent(routes, [n] * 640).replica_id for n in range(3)}
    assert went == set(ADDRESSES)


def test_a_hot_prefix_overflows_to_the_others(routes):
    """Sixty askers at once, and no report comes in between."""
    done(sent(routes))
    asked = [sent(routes, PROMPT + [n] * 200) for n in range(60)]
    counts = [sum(route.replica_id == name for route in asked) for name in ADDRESSES]
    assert min(counts) >= 12


def test_a_prefix_that_many_want_from_the_start_is_computed_at_all_idle_replicas_at_once(routes):
    asked = [sent(routes, PROMPT + [n] * 20) for n in range(3)]
    assert {route.replica_id for route in asked} == {*ADDRESSES}
    assert [route.decision.reason for route in asked] == [Reason.LOAD, Reason.COPY, Reason.COPY]


def test_blocks_are_coming_until_the_first_token_of_whoever_has_most_of_them_computed(routes):
    first = sent(routes, PROMPT + [0] * 20)
    here = first.replica_id
    assert coming(routes, PROMPT) == {here}
    first.answered()
    assert coming(routes, PROMPT) == set()
    longer = routes.route(PROMPT + [1] * 200)  # 13 blocks, of which 10 are there
    longer.rank(ADDRESSES), longer.reserved(here)
    assert longer.known_blocks == 10
    assert coming(routes, PROMPT + [1] * 200) == set()
    other = routes.route([n + 5000 for n in PROMPT])
    other.rank(ADDRESSES), other.reserved(here)
    assert other.waits
    assert coming(routes, PROMPT) == set()


def coming(routes, prompt):
    route = routes.route(prompt + [9] * 20)
    route.rank(ADDRESSES)
    route.ended()
    return {name for name, candidate in route.candidates.items() if candidate.coming}


def test_what_was_sent_counts_until_a_report_knows_of_it(routes):
    route = sent(routes)
    route.submitted(1)
    (probe,) = [c for c in _candidates(routes) if c.replica_id == route.replica_id]
    assert (probe.sent_tokens, probe.sent_requests, probe.open_requests) == (640, 1, 1)
    routes.heard(route.replica_id, IDLE, 1)
    (probe,) = [c for c in _candidates(routes) if c.replica_id == route.replica_id]
    assert (probe.sent_tokens, probe.sent_requests, probe.open_requests) == (0, 0, 1)
    route.ended()
    (probe,) = [c for c in _candidates(routes) if c.replica_id == route.replica_id]
    assert probe.open_requests == 0


def test_what_was_sent_counts_from_when_the_first_of_it_was(routes, clock):
    route = sent(routes)
    clock.now_s += 2
    while sent(routes).replica_id != route.replica_id:
        pass
    clock.now_s += 3
    (probe,) = [c for c in _candidates(routes) if c.replica_id == route.replica_id]
    assert (probe.sent_requests, probe.sent_age_s) == (2, 5)
    assert all(c.sent_age_s == 0 for c in _candidates(routes) if not c.sent_requests)


def test_a_request_that_is_ranked_again_keeps_its_call_where_it_stays(routes):
    done(sent(routes))
    route = routes.route(PROMPT)
    best, second, _ = route.rank(ADDRESSES)
    route.submitted(7)
    assert (route.rank(ADDRESSES)[0], route.call) == (best, 7)
    route.reserved(second)
    assert route.call == 0


def test_whoever_asked_for_a_route_hears_when_it_was_ranked_unless_it_is_over(routes):
    heard = []
    route = routes.route(PROMPT, ranked=lambda *what: heard.append(what))
    best, *_ = route.rank(ADDRESSES)
    route.ended()
    route.rank(ADDRESSES)
    assert heard == [(route, best, True)]


@pytest.mark.parametrize(
    ("load", "room"),
    [
        ({"running": 3, "waiting": 0}, True),
        ({"running": 3, "waiting": 1}, False),
        ({"max_running": 0}, False),
    ],
)
def test_there_is_room_where_a_request_would_run_at_once(clock, load, room):
    heard = []
    routes = Routes(clock=clock, seed=0)
    routes.joined("a", KEYS, 64)
    routes.heard("a", replace(IDLE, **{"max_running": 4, **load}), 0)
    route = routes.route(PROMPT, ranked=lambda *what: heard.append(what))
    route.rank({"a": "a:1"})
    clock.now_s += 60
    route.rank({"a": "a:1"})
    assert heard == [(route, "a", room), (route, "a", False)]  # nobody has heard of it for so long


def test_serve_may_have_chosen_another_one(routes):
    route = routes.route(PROMPT)
    best, second, _ = route.rank(ADDRESSES)
    route.reserved(second)
    assert (route.decision.replica_id, route.decision.predicted) == (second, None)
    opened = {c.replica_id: c.open_requests for c in _candidates(routes)}
    assert (opened[best], opened[second]) == (0, 1)


def test_one_that_is_avoided_comes_last_and_is_met_again_later(routes, clock):
    route = sent(routes)
    done(route)
    routes.left(route.replica_id, avoid_s=5)
    assert routes.avoids(route.replica_id)
    assert routes.route(PROMPT).rank(ADDRESSES)[-1] == route.replica_id
    assert routes.unknown() == {}
    clock.now_s += 6
    assert not routes.avoids(route.replica_id)
    assert routes.unknown() == {route.replica_id: ADDRESSES[route.replica_id]}


def test_one_that_was_lost_comes_last_until_it_is_met_again(routes, clock):
    """Nothing is known of it, which would make it look idle."""
    for name in ("a", "b"):
        routes.heard(name, replace(IDLE, queued_tokens=500), 0)
    routes.left("c", avoid_s=5)
    clock.now_s += 6
    routes.heard("a", replace(IDLE, queued_tokens=500), 0)
    routes.heard("b", replace(IDLE, queued_tokens=500), 0)
    assert routes.route(PROMPT).rank(ADDRESSES)[-1] == "c"
    routes.joined("c", KEYS, 64)
    routes.heard("c", IDLE, 0)
    assert routes.route(PROMPT).rank(ADDRESSES)[0] == "c"


def test_one_that_is_over_counts_nowhere_when_serve_ranks_it_once_more(routes):
    route = sent(routes)
    decision = route.decision
    done(route)
    assert set(route.rank(ADDRESSES)) == set(ADDRESSES)
    assert route.decision == decision
    assert {c.open_requests for c in _candidates(routes)} == {0}


def test_one_that_is_avoided_stays_so_when_it_leaves_once_more(routes):
    routes.left("a", avoid_s=5)
    routes.joined("a", KEYS, 64)
    routes.left("a")
    assert routes.avoids("a")


def test_one_that_merely_left_or_was_never_seen_is_not_avoided(routes):
    routes.left("a")
    routes.left("never seen", avoid_s=5)
    assert not any(routes.avoids(name) for name in (*ADDRESSES, "never seen"))


def test_one_that_serve_forgot_is_forgotten(routes):
    done(sent(routes))
    routes.left("a", avoid_s=5)
    routes.route(PROMPT).rank({"new": "127.0.0.1:9"})
    assert not routes.avoids("a")
    assert routes.numbers().known_blocks == 0
    assert routes.unknown() == {"new": "127.0.0.1:9"}


def test_replicas_of_other_weights_have_other_keys(routes):
    """As during a rolling update: what one version holds is nothing to the other."""
    first = sent(routes)
    done(first)
    routes.left(first.replica_id)
    routes.joined(first.replica_id, KeySpace(b"layout", b"new weights", b"transforms"), 64)
    routes.heard(first.replica_id, IDLE, 0)
    assert sent(routes).decision.predicted.cached_tokens == 0


def test_numbers_tell_predictions_from_what_came(routes, clock):
    route = sent(routes)
    clock.now_s += 1.0
    done(route)
    numbers = routes.numbers()
    assert numbers.decisions[Reason.LOAD] == 1
    assert numbers.predicted == 1
    assert numbers.predicted_first_token_s == pytest.approx(0.64)
    assert numbers.error_s == pytest.approx(0.36)
    assert numbers.known_blocks == 9


def _candidates(routes):
    probe = routes.route([1])
    probe.rank(ADDRESSES)
    probe.ended()
    return probe.candidates.values()
