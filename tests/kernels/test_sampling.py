import pytest
import torch

from quire.kernels.sampling import Draw, Filters, logprobs, penalize_, sample, uniform


def _draw(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, u=0.5, sort=False) -> Draw:
    """`u`: one number for all rows, or a tensor. Without filters nothing is sorted, unless `sort` says so."""
    filters = Filters(torch.full((rows,), top_k), torch.full((rows,), top_p), torch.full((rows,), min_p))
    return Draw(
        rows_D=torch.arange(rows),
        temperature_D=torch.full((rows,), temperature),
        uniform_D=torch.as_tensor(u, dtype=torch.float64).expand(rows),
        filters=filters if sort or top_k or top_p < 1 or min_p else None,
    )


def _drawn(logits, n=2000, **filters) -> set[int]:
    us = [i / n for i in range(n)]
    return {int(sample(logits[None], [_draw(1, u=u, **filters)])) for u in us}


def test_rows_that_do_not_draw_take_the_likeliest():
    logits = torch.randn(5, 97)
    assert torch.equal(sample(logits), logits.argmax(-1))
    draw = _draw(1, temperature=100.0, u=0.999999)
    tokens = sample(logits, [Draw(torch.tensor([3]), draw.temperature_D, draw.uniform_D)])
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(tokens[others], logits.argmax(-1)[others])
    assert tokens[3] > 90


@pytest.mark.parametrize("sort", [False, True])
def test_draws_follow_the_distribution(sort):
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    n = 4000
    counts = torch.zeros(4)
    for i in range(n):
        draw = _draw(1, temperature=0.7, u=(i + 0.5) / n, sort=sort)
        counts[int(sample(logits[None], [draw]))] += 1
    expected = (logits / 0.7).softmax(-1)
    assert (counts / n - expected).abs().max() < 2 / n


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {3, 2}),
        ({"top_p": 0.74}, {3, 2}),  # 0.5 alone does not reach it
        ({"top_p": 0.49}, {3}),
        ({"min_p": 0.35}, {3, 2}),
        ({"top_k": 3, "top_p": 0.6}, {3, 2}),
        ({}, {0, 1, 2, 3}),
        ({"sort": True}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_exactly_the_likeliest(filters, kept):
    logits = torch.tensor([0.1, 0.15, 0.25, 0.5]).log()
    assert _drawn(logits, **filters) == kept


@pytest.mark.parametrize("sort", [False, True])
def test_forbidden_tokens_are_never_drawn(sort):
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    assert _drawn(logits, sort=sort) == {1, 3}
    assert int(sample(logits[None], [_draw(1, u=1 - 2**-53, sort=sort)])) in {1, 3}
    assert int(sample(logits[None], [_draw(1, u=0.0, sort=sort)])) in {1, 3}


@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9}])
def test_a_row_does_not_see_the_others(filters):
    logits = torch.randn(31, 513)
    u = torch.rand(31, dtype=torch.float64)
    together = sample(logits, [_draw(31, 0.8, u=u, **filters)])
    alone = [int(sample(logits[i : i + 1], [_draw(1, 0.8, u=u[i], **filters)])) for i in range(31)]
    assert together.tolist() == alone


def test_penalties_touch_only_the_tokens_they_name():
    logits = torch.tensor([2.0, -2.0, 1.0, 3.0])
    penalize_(
        logits,
        seen=torch.tensor([0, 1]),
        output=torch.tensor([3]),
        counts=torch.tensor([2.0]),
        repetition=2.0,
        presence=0.5,
        frequency=0.25,
    )
    assert logits.tolist() == [1.0, -4.0, 1.0, 2.0]


def test_logprobs_are_normalized_and_sorted():
    logits = torch.randn(3, 50)
    own, ids, values = logprobs(logits, torch.tensor([4, 5, 6]), 5)
    expected = logits.log_softmax(-1)
    assert torch.equal(own, expected[torch.arange(3), torch.tensor([4, 5, 6])])
    assert torch.equal(values, expected.gather(1, ids))
    assert (values.diff(dim=1) <= 0).all()


def test_the_random_number_depends_on_seed_and_position_alone():
    assert uniform(7, 3) == uniform(7, 3)
    numbers = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(numbers)) == 2000
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03
