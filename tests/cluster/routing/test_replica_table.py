"""What a gateway knows of its replicas: what it sent, what it hears, what follows for the next request."""

import pytest

from quire.cluster.routing import replica_table
from quire.cluster.routing.replica_table import ReplicaTable, RoutedRequest
from quire.cluster.routing.score import Reason
from quire.kvstore.books.keys import KeySpace
from quire.replicas.engine.load_report import LoadReport

KEYS = KeySpace(b"layout", b"weights", b"transforms")
NAMES = ("a", "b", "c")
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
def table(clock):
    table = ReplicaTable(clock=clock, seed=0)
    for name in NAMES:
        table.connected(name, KEYS, 64)
        table.heard(name, IDLE, 0)
    return table


def sent(table, prompt=PROMPT, tenant="", without=()):
    """A request that is sent where it is to go."""
    request = RoutedRequest(prompt, tenant)
    assert table.choose(request, without) == request.decision.replica_id
    return request


def at(request):
    return request.decision.replica_id


def done(table, request, output=()):
    table.answered(request)
    table.ended(request, output)


def test_the_same_prompt_goes_where_it_was(table):
    first = sent(table)
    done(table, first)
    for _ in range(5):
        again = sent(table)
        assert (at(again), again.decision.reason) == (at(first), Reason.PREFIX)
        assert again.decision.predicted.cached_tokens == 9 * 64  # the last token is computed in any case
        done(table, again)


def test_another_tenant_finds_nothing(table):
    done(table, sent(table))
    assert sent(table, tenant="other").decision.predicted.cached_tokens == 0


def test_an_answer_is_part_of_the_next_turns_prefix(table):
    first = sent(table)
    answer = list(range(200))
    done(table, first, answer)
    turn = sent(table, PROMPT + answer + [7] * 40)
    assert at(turn) == at(first)
    assert turn.decision.predicted.cached_tokens == (640 + 199) // 64 * 64


def test_different_prompts_spread(table):
    went = {at(sent(table, [n] * 640)) for n in range(3)}
    assert went == set(NAMES)


def test_a_hot_prefix_overflows_to_the_others(table):
    """Sixty askers at once, and no report comes in between."""
    done(table, sent(table))
    asked = [sent(table, PROMPT + [n] * 200) for n in range(60)]
    counts = [sum(at(request) == name for request in asked) for name in NAMES]
    assert min(counts) >= 12


def test_a_prefix_that_many_want_from_the_start_is_computed_at_all_idle_replicas_at_once(table):
    asked = [sent(table, PROMPT + [n] * 20) for n in range(3)]
    assert {at(request) for request in asked} == {*NAMES}
    assert [request.decision.reason for request in asked] == [Reason.LOAD, Reason.COPY, Reason.COPY]


def test_blocks_are_coming_until_the_first_token_of_whoever_has_most_of_them_computed(table):
    first = sent(table, PROMPT + [0] * 20)
    here = at(first)
    assert coming(table, PROMPT) == {here}
    table.answered(first)
    assert coming(table, PROMPT) == set()
    longer = sent(table, PROMPT + [1] * 200)
    assert (at(longer), longer.known_blocks) == (here, 10)
    assert coming(table, PROMPT + [1] * 200) == set()


def coming(table, prompt):
    return {c.replica_id for c in candidates(table, prompt + [9] * 20) if c.coming}


def test_what_was_sent_counts_until_a_report_knows_of_it(table):
    request = sent(table)
    request.call = 1
    (probe,) = [c for c in candidates(table) if c.replica_id == at(request)]
    assert (probe.sent_tokens, probe.sent_requests, probe.open_requests) == (640, 1, 1)
    table.heard(at(request), IDLE, 1)
    (probe,) = [c for c in candidates(table) if c.replica_id == at(request)]
    assert (probe.sent_tokens, probe.sent_requests, probe.open_requests) == (0, 0, 1)
    table.ended(request)
    (probe,) = [c for c in candidates(table) if c.replica_id == at(request)]
    assert probe.open_requests == 0


def test_what_was_sent_counts_from_when_the_first_of_it_was(table, clock):
    request = sent(table)
    clock.now_s += 2
    while at(sent(table)) != at(request):
        pass
    clock.now_s += 3
    (probe,) = [c for c in candidates(table) if c.replica_id == at(request)]
    assert (probe.sent_requests, probe.sent_age_s) == (2, 5)
    assert all(c.sent_age_s == 0 for c in candidates(table) if not c.sent_requests)


def test_one_that_drains_or_is_not_listed_or_has_refused_it_is_not_chosen(table):
    table.draining("a")
    assert {at(sent(table, [n] * 640)) for n in range(4)} == {"b", "c"}
    assert {at(sent(table, [n] * 640, without={"b"})) for n in range(4)} == {"c"}
    table.listed({"a", "b"})
    assert {at(sent(table, [n] * 640)) for n in range(4)} == {"b"}
    assert table.candidates(without={"b"}) == []
    assert table.choose(RoutedRequest(PROMPT), {"b"}) is None


def test_one_whose_stream_has_ended_is_forgotten(table):
    request = sent(table)
    table.disconnected(at(request))
    table.heard(at(request), IDLE, 0)
    assert table.numbers().known_blocks == 0
    assert at(request) not in table.candidates()
    done(table, request, [1] * 200)
    assert table.numbers().known_blocks == 0


def test_a_request_is_sent_anywhere_if_choosing_fails(table, monkeypatch):
    monkeypatch.setattr(replica_table, "rank", lambda *_: 1 / 0)
    assert sent(table).decision.reason is Reason.FALLBACK


def test_replicas_of_other_weights_have_other_keys(table):
    """As during a rolling update: what one version holds is nothing to the other."""
    first = sent(table)
    done(table, first)
    table.disconnected(at(first))
    table.connected(at(first), KeySpace(b"layout", b"new weights", b"transforms"), 64)
    table.heard(at(first), IDLE, 0)
    assert sent(table).decision.predicted.cached_tokens == 0


def test_numbers_tell_predictions_from_what_came(table, clock):
    request = sent(table)
    clock.now_s += 1.0
    done(table, request)
    numbers = table.numbers()
    assert numbers.decisions[Reason.LOAD] == 1
    assert numbers.predicted == 1
    assert numbers.predicted_first_token_s == pytest.approx(0.64)
    assert numbers.error_s == pytest.approx(0.36)
    assert numbers.known_blocks == 9


def candidates(table, prompt=(1,)):
    return list(table._scored(RoutedRequest(prompt), NAMES, table._clock()))
