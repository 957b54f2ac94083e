"""Where a reward model's scores have their zero and their unit: two numbers in its config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strop.models.heads import ScalarModel

CONFIG_KEY = "strop_reward"
"""config.json's {"strop_reward": {"reward_mean": 0.7, "reward_std": 1.9}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardScale:
    """The raw scores of reference completions: a reward is (score - mean) / std (Ziegler et al. 2019, section 2.1).

    A pairwise loss only sees differences, so that the zero and the unit of raw scores are accidents of the training;
    a critic, a KL coefficient and a weight in a sum of rewards are in units of the reward.
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


def reward_scale(model: ScalarModel, where: str) -> RewardScale:
    """What the model's config.json says; scores as they are where it says nothing. ValueError naming `where`."""
    stored = (model.source_config or {}).get(CONFIG_KEY)
    if stored is None:
        return RewardScale()
    mean, std = _number(stored, "reward_mean"), _number(stored, "reward_std")
    if mean is None or std is None:
        raise ValueError(
            f"{where}: {CONFIG_KEY} must hold the finite numbers reward_mean and reward_std, not {stored!r}"
        )
    if not std > 0:
        raise ValueError(f"{where}: {CONFIG_KEY}.reward_std is {std}, but a unit must be above 0")
    return RewardScale(mean=mean, std=std)


def _number(table: Any, key: str) -> float | None:
    value = table.get(key) if isinstance(table, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
