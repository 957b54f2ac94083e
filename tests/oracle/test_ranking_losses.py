"""Ranking losses with ties, margins and unequal lengths, against their definitions written out pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from strop.objectives.reward_model import bradley_terry_loss, kwise_loss, pair_centring, plackett_luce_loss

SCORES = [1.3, -0.2, 0.4, 2.0]
RANKS = [0, 1, 1, 2]


def padded(values: list[float], fill: float = 0.0) -> Tensor:
    """A row of four numbers, the missing ones filled with junk."""
    return torch.tensor([values + [fill] * (4 - len(values))], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count_ties", [True, False])
def test_kwise(size: int, count_ties: bool) -> None:
    margin, centring = 0.3, 0.01
    losses, sums = [], []
    for i, j in itertools.combinations(range(size), 2):
        d = SCORES[i] - SCORES[j]
        sums.append((SCORES[i] + SCORES[j]) ** 2)
        if RANKS[i] != RANKS[j]:
            losses.append(-math.log(sigmoid(d - margin)))
        elif count_ties:
            losses.append(-(math.log(sigmoid(d)) + math.log(sigmoid(-d))) / 2)
    expected = sum(losses) / len(losses) + centring * sum(sums) / len(sums)
    [loss] = kwise_loss(
        padded(SCORES[:size], 1e3),
        padded([1.0] * size).bool(),
        ranks_PK=padded([float(rank) for rank in RANKS[:size]], 9),
        count_ties=count_ties,
        margin_P=torch.tensor([margin], dtype=torch.float64),
        centring_coef=centring,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_two_answers_are_the_pair() -> None:
    scores = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    margin = torch.rand(5, generator=torch.Generator().manual_seed(1))
    pairs = bradley_terry_loss(scores[:, 0], scores[:, 1], margin_B=margin, centring_coef=0.1)
    torch.testing.assert_close(kwise_loss(scores, margin_P=margin, centring_coef=0.1), pairs)
    torch.testing.assert_close(pair_centring(scores), scores.sum(1).square())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_plackett_luce_with_a_tie(size: int) -> None:
    expected = sum(
        math.log(sum(math.exp(SCORES[k]) for k in range(size) if RANKS[k] >= RANKS[i])) - SCORES[i] for i in range(size)
    )
    ranks = padded([float(rank) for rank in RANKS[:size]], 9)
    [loss] = plackett_luce_loss(padded(SCORES[:size], 1e3), padded([1.0] * size).bool(), ranks_PK=ranks)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_swapping_tied_answers_changes_nothing() -> None:
    ranks, mask = torch.tensor([RANKS]), torch.ones(1, 4, dtype=torch.bool)
    one, other = torch.tensor([SCORES]), torch.tensor([[SCORES[0], SCORES[2], SCORES[1], SCORES[3]]])
    for loss in (kwise_loss, plackett_luce_loss):
        torch.testing.assert_close(loss(one, mask, ranks_PK=ranks), loss(other, mask, ranks_PK=ranks))
        assert not torch.allclose(loss(one, mask), loss(other, mask)), "without ranks their order matters"
