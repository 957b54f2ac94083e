"""Where a reward model's scores have their zero and their unit: two numbers in its config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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

    @classmethod
    def of(cls, scores: Tensor) -> RewardScale:
        """That of reference completions with these raw scores; equal scores have no unit of their own, and keep 1."""
        return cls(mean=float(scores.mean()), std=float(scores.std(correction=0)) or 1.0)

    def fields(self) -> dict[str, Any]:
        """What config.json gets."""
        return {CONFIG_KEY: {"reward_mean": self.mean, "reward_std": self.std}}


def read_reward_scale(config: Mapping[str, Any] | None, where: str) -> RewardScale:
    """What a config.json says; scores as they are where it says nothing. ValueError naming `where`."""
    stored = (config or {}).get(CONFIG_KEY)
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
