"""Agreement of scores with preferences: numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from strop.data.comparisons import Answer, Comparison
from strop.evals.comparisons import comparison_metrics, length_preference


def comparison(*lengths: int, ranks: tuple[int, ...] | None = None) -> Comparison:
    answers = tuple(Answer(token_ids=(7,) * length, mask=(True,) * length) for length in lengths)
    return Comparison(where="x:1", prompt_ids=(1,), answers=answers, ranks=ranks or tuple(range(len(lengths))))


def test_accuracy_counts_a_comparison_once_and_equal_scores_half() -> None:
    both = [comparison(5, 5), comparison(5, 5, 5)]
    metrics = comparison_metrics(both, [np.array([1.0, 0.0]), np.array([0.0, 0.0, 2.0])])
    # The ranking of three: one pair equal (a half), two wrong: 1/6.
    assert metrics["accuracy"] == pytest.approx((1 + 1 / 6) / 2)
    assert metrics["margin"] == pytest.approx((1 + (0 - 2 - 2) / 3) / 2)
    nll = [math.log1p(math.exp(-1)), (math.log(2) + 2 * math.log1p(math.exp(2))) / 3]
    assert metrics["nll"] == pytest.approx(sum(nll) / 2)
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]


def test_calibration() -> None:
    """Three of four right at confidence 0.9: 0.15 too sure. At confidence 0.75 it is exact."""
    four = [comparison(2, 2)] * 4

    def at(confidence: float) -> dict[str, float]:
        difference = math.log(confidence / (1 - confidence))
        scores = [np.array([difference, 0.0])] * 3 + [np.array([0.0, difference])]
        return comparison_metrics(four, scores)

    assert at(0.9)["overconfidence"] == pytest.approx(0.15)
    assert at(0.9)["calibration_error"] == pytest.approx(0.15)
    assert at(0.75)["calibration_error"] == pytest.approx(0.0, abs=1e-12)
    assert at(0.6)["calibration_error"] == pytest.approx(0.15) and at(0.6)["overconfidence"] == pytest.approx(-0.15)


def test_the_length_only_judge_and_the_length_buckets() -> None:
    shorter_wins, longer_wins, alike = comparison(2, 10), comparison(10, 2), comparison(20, 20)
    data = [shorter_wins, shorter_wins, longer_wins, alike]
    assert not length_preference(data) and length_preference([longer_wins, alike])
    scores = [np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    metrics = comparison_metrics(data, scores, prefers_longer=False)
    assert metrics["accuracy_length_only"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert metrics["accuracy_chosen_shorter"] == 0.5
    assert metrics["accuracy_chosen_longer"] == 1.0
    assert metrics["accuracy_like_lengths"] == metrics["accuracy_long"] == 0.0


def test_ties_are_left_out_and_only_ties_are_an_error() -> None:
    tied = comparison(3, 3, ranks=(0, 0))
    metrics = comparison_metrics([tied, comparison(3, 3)], [np.array([0.0, 5.0]), np.array([1.0, 0.0])])
    assert metrics["accuracy"] == 1.0
    with pytest.raises(ValueError, match="every held-out comparison is a tie"):
        comparison_metrics([tied], [np.array([0.0, 5.0])])
