"""From rewards to advantages: with a critic (gae), from a group of samples, or from the whole batch.

Nothing here carries gradients. Statistics (group means, whitening) belong to the full batch: take them before it is cut
into minibatches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from strop.objectives.aggregate import zero_masked

AdvantageScale = Literal["none", "std"]
Baseline = Literal["batch", "group"]


@torch.no_grad()
def token_rewards(rewards_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """Per-token rewards of PPO: -kl_coef * kl everywhere, plus the sequence's reward on its last counting token.

    kl_BT is kl.kl_k1 of the logprobs at sampling time. The last counting token is the last True of the mask (the stop
    token), not the column before the padding: the mask may have holes. Shape (B, T), 0 where masked. A sequence
    without a counting token loses its reward.
    """
    positions_T = torch.arange(mask_BT.shape[-1], device=mask_BT.device)
    last_B1 = torch.where(mask_BT, positions_T, -1).amax(-1, keepdim=True)
    is_last_BT = mask_BT & (positions_T == last_B1)
    return zero_masked(-kl_coef * zero_masked(kl_BT, mask_BT), mask_BT) + zero_masked(
        rewards_B.unsqueeze(-1), is_last_BT
    )


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the critic's targets, both (B, T) (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lambda * A_{t+1},    returns = A + V

    t + 1 is the next COUNTING token: masked positions (padding, tool output in the middle) are stepped over, their
    rewards and values never read, their results 0. V after the last counting token is 0. V_t is the value before
    token t is produced. With values of 0 and lambda = 1 the result is the discounted return-to-go (REINFORCE++).
    Returns come before whitening: whiten only the advantages.
    """
    rewards_BT, values_BT = zero_masked(rewards_BT, mask_BT), zero_masked(values_BT, mask_BT)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = torch.zeros_like(values_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BT.shape[1])):
        mask_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = torch.where(mask_B, delta_B + gamma * gae_lambda * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = zero_masked(next_advantage_B, mask_B)
    return advantages_BT, advantages_BT + values_BT


@torch.no_grad()
def whiten(
    values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """(x - mean) * rsqrt(var + eps) over all counting positions; 0 where masked. Any shape.

    shift_mean=False adds the mean back: it rescales rewards around their mean without moving it. TRL and verl divide
    by N - 1 (unbiased), the original lm-human-preferences by N. Raises ValueError when there are too few positions.
    """
    counted = values.flatten() if mask is None else values[mask]
    if counted.numel() < (2 if unbiased else 1):
        raise ValueError(f"whitening needs at least 2 counting positions, got {counted.numel()}")
    mean = counted.mean()
    whitened = (zero_masked(values, mask) - mean) * torch.rsqrt(counted.var(correction=int(unbiased)) + eps)
    return zero_masked(whitened if shift_mean else whitened + mean, mask)


@torch.no_grad()
def group_advantages(
    rewards_PG: Tensor,
    mask_PG: Tensor | None = None,
    *,
    scale: AdvantageScale,
    unbiased: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """Reward minus the mean of its prompt's group, over the group's standard deviation if scale is "std"; (P, G).

        A = R - mean(R)                        scale "none" (Dr. GRPO)
        A = (R - mean(R)) / (std(R) + eps)     scale "std"  (GRPO; DeepSeekMath section 4.1.2)

    Dividing by the std weights prompts that are nearly always or nearly never solved more than those in between.
    TRL: unbiased, eps 1e-4. verl: unbiased, 1e-6. A group whose rewards are all equal gets exactly 0, whatever eps.
    mask_PG (bool) leaves out samples without a valid reward: they get 0 and do not enter the statistics. A group of
    one has no baseline: G = 1 raises ValueError, a group with one valid sample left gets 0.
    """
    _check_group_size(rewards_PG)
    rewards_PG, count_P1 = zero_masked(rewards_PG, mask_PG), _count(rewards_PG, mask_PG)
    centred_PG = _centred(rewards_PG, mask_PG, count_P1)
    if scale == "std":
        degrees_P1 = (count_P1 - 1 if unbiased else count_P1).clamp(min=1)
        centred_PG = centred_PG / ((centred_PG.square().sum(-1, keepdim=True) / degrees_P1).sqrt() + eps)
    return zero_masked(centred_PG, _varies(rewards_PG, mask_PG))


@torch.no_grad()
def leave_one_out_advantages(rewards_PG: Tensor, mask_PG: Tensor | None = None) -> Tensor:
    """Reward minus the mean of the OTHER samples of its group, (P, G) (RLOO; Ahmadian et al. 2024).

        A_i = R_i - mean_{j != i} R_j = G / (G - 1) * (R_i - mean(R))

    An unbiased policy gradient, unlike R - mean(R), which is (G - 1) / G of it. KL in the reward must be in R already.
    Masks and group sizes as in group_advantages.
    """
    _check_group_size(rewards_PG)
    rewards_PG, count_P1 = zero_masked(rewards_PG, mask_PG), _count(rewards_PG, mask_PG)
    advantages_PG = _centred(rewards_PG, mask_PG, count_P1) * (count_P1 / (count_P1 - 1).clamp(min=1))
    return zero_masked(advantages_PG, _varies(rewards_PG, mask_PG))


@torch.no_grad()
def batch_advantages(
    rewards_PG: Tensor,
    mask_PG: Tensor | None = None,
    *,
    baseline: Baseline = "batch",
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Rewards centred on the batch or on their group, then divided by the standard deviation over the whole BATCH.

    REINFORCE++ (Hu 2025) with baseline "batch", its "-baseline" variant with "group". One scale for all prompts:
    no prompt is weighted up for being nearly solved, unlike group_advantages(scale="std"). Shape (P, G); G = 1 is fine
    with baseline "batch"; with "group" a group of equal rewards gets exactly 0. For token-level returns use gae and
    whiten.
    """
    if baseline == "batch":
        return whiten(rewards_PG, mask_PG, unbiased=unbiased, eps=eps)
    centred_PG = group_advantages(rewards_PG, mask_PG, scale="none")
    return zero_masked(whiten(centred_PG, mask_PG, unbiased=unbiased, eps=eps), _varies(rewards_PG, mask_PG))


def _check_group_size(rewards_PG: Tensor) -> None:
    if rewards_PG.shape[-1] < 2:
        raise ValueError("group_size is 1: a group baseline needs at least 2 samples per prompt")


def _count(rewards_PG: Tensor, mask_PG: Tensor | None) -> Tensor:
    if mask_PG is None:
        return torch.full_like(rewards_PG[:, :1], rewards_PG.shape[-1])
    return mask_PG.sum(-1, keepdim=True).to(rewards_PG.dtype)


def _centred(rewards_PG: Tensor, mask_PG: Tensor | None, count_P1: Tensor) -> Tensor:
    return zero_masked(rewards_PG - rewards_PG.sum(-1, keepdim=True) / count_P1.clamp(min=1), mask_PG)


def _varies(rewards_PG: Tensor, mask_PG: Tensor | None) -> Tensor:
    """Bool (P, G): this sample counts, and its group's rewards are not all equal.

    Without it equal rewards of 0.1 leave a rounding error that a small eps would blow up into an advantage.
    """
    counts_PG = torch.ones_like(rewards_PG, dtype=torch.bool) if mask_PG is None else mask_PG
    highest_P1 = torch.where(counts_PG, rewards_PG, -torch.inf).amax(-1, keepdim=True)
    lowest_P1 = torch.where(counts_PG, rewards_PG, torch.inf).amin(-1, keepdim=True)
    return counts_PG & (highest_P1 > lowest_P1)
