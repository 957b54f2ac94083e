"""Token-weighted averages that add up over micro-batches, so that a metric does not depend on how a batch was cut."""

from __future__ import annotations

import torch
from torch import Tensor


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
