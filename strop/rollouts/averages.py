"""Token-weighted averages that add up over micro-batches, so that a metric does not depend on how a batch was cut."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

ENGINE_GAP_ALARM = 1.05
"""Mean of exp(|engine's logprob - trainer's|) per token from which a run warns. 1 where both have the same kernels,
1.04 in bfloat16 where they have not."""


class Averages:
    """Sums and counts of per-token values over the positions that count; result() divides once, at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, values_BT: Tensor, mask_BT: Tensor) -> None:
        """Add the values at the True positions of the mask to the average called `name`."""
        chosen = values_BT.detach()[mask_BT]
        total = self._sums.setdefault(name, [0.0, 0.0])
        total[0] += float(chosen.to(torch.float64).sum())
        total[1] += chosen.numel()

    def maximum(self, name: str, values_BT: Tensor, mask_BT: Tensor) -> None:
        """Track the largest value at the True positions."""
        chosen = values_BT.detach()[mask_BT]
        if chosen.numel():
            self._maxima[name] = max(self._maxima.get(name, float("-inf")), float(chosen.max()))

    def result(self) -> dict[str, float]:
        """Averages and maxima by name; a name without a single counting position is left out."""
        return {name: total / count for name, (total, count) in self._sums.items() if count} | self._maxima


def add_engine_gap(averages: Averages, old_BT: Tensor, sampling_BT: Tensor, mask_BT: Tensor) -> None:
    """How far the engine's logprobs are from the trainer's before the update, which should be the same."""
    gap_BT = (old_BT - sampling_BT).abs()
    averages.add("engine_gap", gap_BT, mask_BT)
    averages.add("engine_gap_exp", gap_BT.exp(), mask_BT)
    averages.maximum("engine_gap_max", gap_BT, mask_BT)


def warn_of_engine_gap(metrics: Mapping[str, float], remedy: str) -> None:
    """A UserWarning when the gap is too wide to call the samples the policy's."""
    if metrics.get("engine_gap_exp", 1.0) > ENGINE_GAP_ALARM:
        warnings.warn(
            f"the engine's logprobs are far from the trainer's (engine_gap_exp in metrics.jsonl): {remedy}",
            stacklevel=2,
        )
