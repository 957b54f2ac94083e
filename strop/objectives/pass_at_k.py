"""Closed forms for several samples per prompt."""

from __future__ import annotations

import math


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right (Chen et al. 2021, eq. 1).

        1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1..n} (1 - k / i)

    1 - (1 - c/n)^k looks the same and is biased low. Average this over prompts; needs num_samples >= k.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples} samples per prompt: draw more samples or lower k")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must lie in [0, {num_samples}], not {num_correct}")
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def bon_kl(num_samples: int) -> float:
    """KL (nats) of best-of-n to the policy it samples from: log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).

    Exact for a continuous score and an upper bound when samples can tie (Beirami et al. 2024).
    """
    if num_samples < 1:
        raise ValueError(f"best-of-n needs n >= 1, not {num_samples}")
    return math.log(num_samples) - (num_samples - 1) / num_samples
