"""How a recipe names a reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One part of the reward.

    Example, in a recipe:
    rewards = [{ name = "math" }, { name = "format", weight = 0.2, options = { pattern = "..." } }]
    """

    name: str
    """math, code, metamath, lean, reasoning_gym, model, judge, vote, format, length, overlong,
    "package.module:function" or "path/file.py:function"."""
    weight: float = 1.0
    """Its factor in the sum."""
    label: str = ""
    """Its name in metrics and samples; empty = name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward, such as answer_column."""

    def spec(self) -> dict[str, Any]:
        """As load_reward takes it."""
        label = {"label": self.label} if self.label else {}
        return {"name": self.name, "weight": self.weight, **label, **self.options}
