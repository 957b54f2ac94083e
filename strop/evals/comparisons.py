"""How well scores agree with held-out preferences, beside what the answers' lengths alone would say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strop.data.comparisons import Comparison
from strop.evals.intervals import mean_interval

NUM_BINS = 10
ALIKE = 0.1
"""Two answers are of like length when it differs by less than this share of the longer one."""


def comparison_metrics(
    comparisons: Sequence[Comparison], scores: Sequence[np.ndarray], *, prefers_longer: bool | None = None
) -> dict[str, float]:
    """accuracy with its 95 % interval, calibration, and accuracy by length; scores[i][k] is that of answer k.

    A comparison counts once, whatever the number of its pairs, and its equal scores count half; ties in the data are
    left out. prefers_longer (what the training data's preferences follow, see length_preference) gives
    accuracy_length_only, to be beaten. `calibration_error` is the mean gap between confidence sigmoid(|difference|)
    and accuracy in 10 bins (ECE; Guo et al. 2017); `overconfidence` is mean confidence minus accuracy. A length bucket
    without a pair is left out.

    Raises ValueError when every comparison is a tie.
    """
    differences, owners, lengths = [], [], []
    for index, (comparison, own) in enumerate(zip(comparisons, scores, strict=True)):
        for better, worse in comparison.pairs:
            differences.append(float(own[better]) - float(own[worse]))
            owners.append(index)
            lengths.append([len(comparison.answers[place].token_ids) for place in (better, worse)])
    if not differences:
        raise ValueError("every held-out comparison is a tie: there is no preference to agree with")
    differences_N, owners_N, lengths_N2 = np.array(differences), np.array(owners), np.array(lengths)
    weights_N = 1.0 / np.bincount(owners_N)[owners_N]
    is_right_N = (np.sign(differences_N) + 1) / 2

    def mean(values_N: np.ndarray, where_N: np.ndarray) -> float:
        return float((values_N * weights_N)[where_N].sum() / weights_N[where_N].sum())

    everywhere = np.ones(len(differences_N), dtype=bool)
    accuracies = [float(is_right_N[owners_N == owner].mean()) for owner in np.unique(owners_N)]
    low, high = mean_interval(accuracies)
    confidence_N = 1 / (1 + np.exp(-np.abs(differences_N)))
    metrics = {
        "accuracy": mean(is_right_N, everywhere),
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": mean(differences_N, everywhere),
        "nll": mean(np.logaddexp(0.0, -differences_N), everywhere),
        "overconfidence": mean(confidence_N - is_right_N, everywhere),
    }
    bins_N = np.minimum(((confidence_N - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [
        abs(mean(confidence_N - is_right_N, bins_N == number)) * float(weights_N[bins_N == number].sum())
        for number in np.unique(bins_N)
    ]
    metrics["calibration_error"] = sum(gaps) / float(weights_N.sum())
    if prefers_longer is not None:
        is_longer_N = (np.sign(lengths_N2[:, 0] - lengths_N2[:, 1]) + 1) / 2
        metrics["accuracy_length_only"] = mean(is_longer_N if prefers_longer else 1 - is_longer_N, everywhere)
    gap_N = (lengths_N2[:, 0] - lengths_N2[:, 1]) / lengths_N2.max(1)
    buckets = {"chosen_longer": gap_N >= ALIKE, "chosen_shorter": gap_N <= -ALIKE, "like_lengths": abs(gap_N) < ALIKE}
    thirds = np.quantile(lengths_N2.mean(1), [1 / 3, 2 / 3])
    third_N = np.searchsorted(thirds, lengths_N2.mean(1))
    buckets |= {name: third_N == number for number, name in enumerate(("short", "medium", "long"))}
    for name, is_in_N in buckets.items():
        if is_in_N.any():
            metrics[f"accuracy_{name}"] = mean(is_right_N, is_in_N)
    return metrics


def length_preference(comparisons: Sequence[Comparison]) -> bool:
    """Whether the longer answer is preferred more often than the shorter: all that a length-only judge could learn."""
    votes = 0.0
    for comparison in comparisons:
        lengths = [len(answer.token_ids) for answer in comparison.answers]
        own = [np.sign(lengths[better] - lengths[worse]) for better, worse in comparison.pairs]
        votes += comparison.weight * float(np.mean(own)) if own else 0.0
    return votes >= 0
