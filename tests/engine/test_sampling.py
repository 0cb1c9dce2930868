from __future__ import annotations

import pytest
import torch

from undivided.engine.sampling import Sampling, sample

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def draw(logits, uniform, temperature=1.0, top_p=1.0):
    count = len(uniform)
    return sample(
        logits.expand(count, -1), torch.full((count,), temperature), torch.full((count,), top_p), uniform
    ).tolist()


def test_a_temperature_of_zero_takes_the_most_probable() -> None:
    assert draw(LOGITS, torch.rand(5), temperature=0.0) == [1] * 5


def test_tokens_come_as_often_as_they_are_probable() -> None:
    # In falling order 1, 3, 2, 0: the distribution function steps at 0.4, 0.7, 0.9.
    assert draw(LOGITS, torch.tensor([0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 0.9999])) == [
        1,
        1,
        3,
        3,
        2,
        2,
        0,
        0,
    ]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    drawn = draw(LOGITS, torch.linspace(0, 0.999, 200), top_p=0.65)
    assert set(drawn) == {1, 3}
    assert drawn.count(1) == pytest.approx(200 * 0.4 / 0.7, abs=1.5)


def test_top_p_keeps_one_however_small() -> None:
    assert draw(LOGITS, torch.tensor([0.0, 0.999999]), top_p=1e-6) == [1, 1]


def test_the_largest_number_draws_a_token_that_exists() -> None:
    below_one = torch.tensor([1 - 2**-24])
    for seed in range(20):
        logits = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        assert 0 <= draw(logits, below_one, top_p=0.9)[0] < 1000


def test_temperature_flattens() -> None:
    hot = draw(LOGITS, torch.linspace(0, 0.999, 400), temperature=100.0)
    assert min(hot.count(token) for token in range(4)) > 80


def test_rows_are_drawn_alone() -> None:
    logits, uniform = torch.randn(6, 50), torch.rand(6)
    temperature, top_p = torch.tensor([0.0, 1, 1, 0.5, 2, 1]), torch.tensor([1, 0.9, 0.2, 1, 1, 0.5])
    together = sample(logits, temperature, top_p, uniform)
    alone = [sample(*(x[row : row + 1] for x in (logits, temperature, top_p, uniform))) for row in range(6)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_the_seed_alone_decides_the_numbers() -> None:
    first = Sampling(temperature=1.0, seed=3).uniforms(8)
    torch.rand(5)
    assert torch.equal(Sampling(temperature=0.3, seed=3).uniforms(8), first)
    assert not torch.equal(Sampling(temperature=1.0, seed=4).uniforms(8), first)
    # A longer continuation begins like a shorter one.
    assert torch.equal(Sampling(temperature=1.0, seed=3).uniforms(5), first[:5])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 is negative"),
        ({"top_p": 0.0}, "top_p=0.0 is not above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 is not above 0"),
    ],
)
def test_numbers_out_of_range_are_named(options, text) -> None:
    with pytest.raises(ValueError, match=text):
        Sampling(**options)


def test_broken_logits_do_not_index_outside() -> None:
    # On CUDA that would end the process, and with it all other requests.
    assert 0 <= draw(torch.full((4,), torch.nan), torch.tensor([0.5]))[0] < 4
