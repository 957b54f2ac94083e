"""Confidence intervals for success rates over tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): honest at 0 and 1, where the normal one has no width."""
    if trials <= 0:
        raise ValueError("an interval needs at least one trial")
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of the mean of per-task rates in [0, 1].

    The tasks are the independent draws, the samples within one are not: so the width comes from the spread between
    tasks. Where every task is right or wrong this is Wilson's interval; where all rates agree, so that the spread says
    nothing, it is Wilson's too.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("an interval needs at least one task")
    mean = float(array.mean())
    is_binary = bool(np.isin(array, (0.0, 1.0)).all())
    if is_binary or array.size < 2 or float(array.std()) == 0.0:
        return wilson_interval(mean * array.size, array.size, z)
    half = z * float(array.std(ddof=1)) / math.sqrt(array.size)
    return max(0.0, mean - half), min(1.0, mean + half)
