"""Estimators of KL(policy || reference) from sampled tokens' log-probabilities, and the controller of their weight.

With d = ref_logprobs - logprobs and tokens sampled from the policy (Schulman 2020, "Approximating KL divergence"):

    estimator   value        mean      expected gradient as a loss
    k1          -d           KL        zero: use it in the reward only
    k2          d^2 / 2      biased    that of the KL
    k3          e^d - 1 - d  KL        p - q on a softmax (p policy, q reference), not that of the KL; GRPO's default
    k3_plus     e^d - 1 - d  KL        that of the KL (k2's)

The trap is the direction: d = logprobs - ref_logprobs in k3 estimates chi2 - KL instead, silently.
No value is clamped: clamping kills the gradient exactly where the policy drifted furthest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.objectives.aggregate import zero_masked


def kl_k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """logprobs - ref_logprobs per token (nats): unbiased, noisy, may be negative. 0 where masked.

    For KL in the reward (PPO, RLOO, REINFORCE++). As a loss it does nothing: its expected gradient is zero.
    """
    return -_log_ratio_to_reference(logprobs_BT, ref_logprobs_BT, mask_BT)


def kl_k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """(logprobs - ref_logprobs)^2 / 2 per token: a biased value whose gradient is that of the KL in expectation."""
    return 0.5 * _log_ratio_to_reference(logprobs_BT, ref_logprobs_BT, mask_BT).square()


def kl_k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """e^d - 1 - d per token (nats), d = ref_logprobs - logprobs: unbiased, low variance, never negative.

    Computed with expm1: e^d - 1 - d turns negative in float32 near d = 0. Its gradient (1 - e^d) * grad logprob is not
    that of the KL (the table above); DeepSeekMath's GRPO (eq. 4) uses it as a loss all the same. For tokens of an
    older policy multiply by policy_gradient.importance_ratio (DeepSeek-V3.2).
    """
    d_BT = _log_ratio_to_reference(logprobs_BT, ref_logprobs_BT, mask_BT)
    return torch.expm1(d_BT) - d_BT


def kl_k3_plus(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """k3's value with k2's gradient (straight-through): an unbiased number to log, an unbiased gradient."""
    k2_BT = kl_k2(logprobs_BT, ref_logprobs_BT, mask_BT)
    return k2_BT + (kl_k3(logprobs_BT, ref_logprobs_BT, mask_BT) - k2_BT).detach()


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_episodes: int) -> float:
    """The next KL coefficient: a proportional controller with a clipped error (Ziegler et al. 2019, section 2.2).

        kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_episodes / horizon)

    kl is the SUM over a sequence's tokens, averaged over sequences (nats), not a mean per token. horizon and
    num_episodes (sampled since the last call) are counted in episodes, not in steps. Published: 0.15, 6 nats, 10000.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"the KL target ({target} nats per sequence) and horizon ({horizon} episodes) must be > 0")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)


def _log_ratio_to_reference(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    return zero_masked(ref_logprobs_BT, mask_BT) - zero_masked(logprobs_BT, mask_BT)
