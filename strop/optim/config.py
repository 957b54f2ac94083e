"""The optimiser's part of every stage's config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from strop.optim.adamw import AdamW
from strop.optim.schedule import Schedule, learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """"constant", "linear", "cosine" or "wsd", from the end of the warm-up to num_steps."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly to its peak."""
    final_fraction: float = 0.0
    """The rate at the end, as a fraction of the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment; 0.95 is usual in pre-training."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """On matrices only."""
    state: Literal["32bit", "8bit"] = "32bit"
    """"8bit" keeps both moments in a byte each: 2 bytes per weight instead of 8, and not quite the same numbers."""
    max_grad_norm: float = 1.0
    """The gradient's global norm is clipped to it; inf never clips."""
    max_skipped_steps: int = 5
    """So many steps in a row with a non-finite gradient stop the run, and the last batch is saved in the run folder."""

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> AdamW:
        return AdamW(
            named_parameters,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            is_8bit=self.state == "8bit",
        )

    def lr_at(self, step: int, total_steps: int) -> float:
        return learning_rate(
            step,
            schedule=self.schedule,
            peak=self.lr,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            final_fraction=self.final_fraction,
        )
