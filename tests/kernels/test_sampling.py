import pytest
import torch

from quire.kernels.sampling import Draw, logprobs, penalize_, sample, uniform


def _draw(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, u=0.5) -> Draw:
    return Draw(
        temperature_R=torch.full((rows,), temperature),
        top_k_R=torch.full((rows,), top_k),
        top_p_R=torch.full((rows,), top_p),
        min_p_R=torch.full((rows,), min_p),
        uniform_R=torch.tensor(u, dtype=torch.float64).expand(rows),
    )


def _drawn(logits, n=2000, **filters) -> set[int]:
    us = [i / n for i in range(n)]
    return {int(sample(logits[None], _draw(1, u=u, **filters))) for u in us}


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(5, 97)
    assert torch.equal(sample(logits, _draw(5, temperature=0.0)), logits.argmax(-1))


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    n = 4000
    counts = torch.zeros(4)
    for i in range(n):
        counts[int(sample(logits[None], _draw(1, temperature=0.7, u=(i + 0.5) / n)))] += 1
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
    ],
)
def test_filters_keep_exactly_the_likeliest(filters, kept):
    logits = torch.tensor([0.1, 0.15, 0.25, 0.5]).log()
    assert _drawn(logits, **filters) == kept


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0])
    assert _drawn(logits) == {1, 3}
    assert int(sample(logits[None], _draw(1, u=1 - 2**-53))) in {1, 3}


def test_a_row_does_not_see_the_others():
    logits = torch.randn(31, 513)
    u = torch.rand(31, dtype=torch.float64)
    together = sample(logits, Draw(*(getattr(_draw(31, 0.8, 50, 0.9), f) for f in _FIELDS), u))
    alone = [
        int(
            sample(
                logits[i : i + 1], Draw(*(getattr(_draw(1, 0.8, 50, 0.9), f) for f in _FIELDS), u[i : i + 1])
            )
        )
        for i in range(31)
    ]
    assert together.tolist() == alone


_FIELDS = ("temperature_R", "top_k_R", "top_p_R", "min_p_R")


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
