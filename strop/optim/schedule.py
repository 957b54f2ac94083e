"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "wsd"]


def learning_rate(
    step: int,
    *,
    schedule: Schedule,
    peak: float,
    warmup_steps: int = 0,
    total_steps: int,
    final_fraction: float = 0.0,
    decay_fraction: float = 0.2,
) -> float:
    """The learning rate of update number `step`, counted from 0 (= the number of updates already made).

        warm-up   peak * (step + 1) / warmup_steps                            while step < warmup_steps
        then      peak * (final_fraction + (1 - final_fraction) * shape(x)),  x = (step - start) / (total_steps - start)
        shape     constant: 1    linear: 1 - x    cosine: (1 + cos(pi x)) / 2    wsd: 1 - sqrt(x)

    start = warmup_steps, but "wsd" (warm-up, stable, decay) stays at the peak until the last decay_fraction of
    total_steps; 1 - sqrt is the best decay of Hägele et al. 2024. Neither end wastes an update: the first has a rate
    above 0, and the last is one step short of the final rate, which holds from total_steps on.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps = {warmup_steps} does not lie between 0 and the {total_steps} steps of the run")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction = {final_fraction} does not lie between 0 and 1")
    if not 0 <= decay_fraction <= 1:
        raise ValueError(f"decay_fraction = {decay_fraction} does not lie between 0 and 1")
    if schedule not in ("constant", "linear", "cosine", "wsd"):
        raise ValueError(f"schedule {schedule!r} is not known: use constant, linear, cosine or wsd")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, total_steps - round(decay_fraction * total_steps))
    x = 1.0 if step >= total_steps else max(0.0, (step - start) / (total_steps - start))
    if schedule == "linear":
        shape = 1.0 - x
    elif schedule == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * x))
    else:
        shape = 1.0 - math.sqrt(x)
    return peak * (final_fraction + (1.0 - final_fraction) * shape)
