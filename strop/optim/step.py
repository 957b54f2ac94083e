"""The one optimiser step that every stage takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from strop.native.freed_memory import give_back_freed_memory
from strop.optim.adamw import AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimiser step did.

    Example: StepReport(grad_norm=1.7, is_skipped=False)
    """

    grad_norm: float
    """Over all parameters together, before clipping."""
    is_skipped: bool
    """True when weights and moments were left bitwise as they were: grad_norm is inf or nan, or no parameter has a
    gradient (grad_norm is then 0)."""


def optimizer_step(optimizer: AdamW, *, lr: float, max_grad_norm: float) -> StepReport:
    """Clip the accumulated gradients by their global norm, update once, free the gradients.

        g <- g * min(1, max_grad_norm / ||g||)        (Pascanu et al. 2013, algorithm 1)

    A non-finite norm changes nothing, and it is the caller who counts it and gives up after several in a row.
    max_grad_norm = inf never clips.
    """
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm = {max_grad_norm} would stop all learning: give a positive number, or inf")
    is_first = not optimizer.has_moments
    grad_norm = optimizer.grad_norm()
    is_skipped = not math.isfinite(grad_norm) or not optimizer.has_gradients
    if not is_skipped:
        optimizer.step(lr=lr, grad_scale=max_grad_norm / grad_norm if grad_norm > max_grad_norm else 1.0)
    optimizer.zero_grad()
    if is_first and not is_skipped:
        # The first step has left behind what later ones keep (kernels that were made for these shapes, threads). Around
        # it the next step finds room at other places; the holes that remain need not be in memory.
        give_back_freed_memory()
    return StepReport(grad_norm=grad_norm, is_skipped=is_skipped)
