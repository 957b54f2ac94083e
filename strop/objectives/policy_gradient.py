"""Policy-gradient surrogates: what is done with r = exp(logprobs - old_logprobs) and the advantage.

Every function returns losses to minimise, unreduced; masking, weights and the denominator are aggregate.py's. mask is
bool, True = a token that the policy sampled; None means that every position counts (packed rows, any shape). Values at
masked positions are never read, not even NaN. Advantages broadcast: (B, 1) for one per sequence.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from strop.objectives.aggregate import sequence_mean, sequence_sum, zero_masked

Level = Literal["token", "sequence"]


def clipped_policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's pessimistic surrogate, one value per token (Schulman et al. 2017, eq. 7).

        -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A),    r = exp(logprobs - old_logprobs)

    The minimum only ever removes incentive: a token already moved past the bound that its advantage favours has zero
    gradient, while moving it back is never clipped. clip_high > clip_low is DAPO's clip-higher (Yu et al. 2025).
    clip_low >= 1 means no lower bound. dual_clip = c also bounds the loss of A < 0 by c * |A| (Ye et al. 2020;
    c > 1, usually 3): without it one token that became likely by accident can own the whole step.
    """
    log_ratio_BT = _log_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    advantages_BT = zero_masked(advantages_BT, mask_BT)
    return _pessimistic(log_ratio_BT, advantages_BT, clip_low, clip_high, dual_clip)


def gspo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """The clipped surrogate of a whole sequence, one value per SEQUENCE, shape (B,) (GSPO; Zheng et al. 2025, eq. 5).

        s = exp(mean_t(logprobs - old_logprobs)),    -min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A)

    s is a geometric mean, much closer to 1 than a token's ratio: published bounds are 3e-4 and 4e-4, not 0.2.
    The step's denominator is the number of sequences. A sequence without counting tokens gives 0.
    """
    mean_log_ratio_B = sequence_mean(_log_ratio(logprobs_BT, old_logprobs_BT, mask_BT), mask_BT)
    loss_B = _pessimistic(mean_log_ratio_B, advantages_B, clip_low, clip_high, None)
    return zero_masked(loss_B, mask_BT.any(-1))


def gspo_token_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """GSPO with one value per token, so that advantages may differ inside a sequence (Zheng et al. 2025, eq. 13-14).

        s_t = sg[s] * exp(logprob_t - sg[logprob_t]),    s = exp(mean_t(logprobs - old_logprobs))

    Aggregated with seq_mean_token_mean it has gspo_loss's value, and its gradient when the advantage is constant along
    the sequence. Every token of a sequence is clipped or none.
    """
    log_ratio_BT = _log_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    mean_log_ratio_B1 = sequence_mean(log_ratio_BT, mask_BT).detach().unsqueeze(-1)
    log_ratio_BT = mean_log_ratio_B1 + (log_ratio_BT - log_ratio_BT.detach())
    return zero_masked(
        _pessimistic(log_ratio_BT, zero_masked(advantages_BT, mask_BT), clip_low, clip_high, None), mask_BT
    )


def cispo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    ratio_max: float,
    ratio_min: float = 0.0,
) -> Tensor:
    """REINFORCE weighted by a clipped, detached ratio, one value per token (CISPO; MiniMax-M1 2025, eq. 4-5).

        -sg[clip(r, ratio_min, ratio_max)] * A * logprob

    Unlike PPO's clip no token ever loses its gradient; only its weight is bounded. The bounds are values of the RATIO
    itself, not distances from 1: ratio_max 1.2 is "epsilon 0.2" where a paper writes 1 + epsilon, and TRL's
    epsilon_high = 5.0 is ratio_max 5.0. The paper caps above only (ratio_min 0); verl clips both sides (0.8, 1.2).
    """
    log_ratio_BT = _log_ratio(logprobs_BT, old_logprobs_BT, mask_BT).detach()
    weight_BT = torch.exp(log_ratio_BT.clamp(_log(ratio_min), _log(ratio_max)))
    return -weight_BT * zero_masked(advantages_BT, mask_BT) * zero_masked(logprobs_BT, mask_BT)


def sapo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tensor:
    """A smooth gate instead of a clip, one value per token (SAPO; Gao et al. 2025).

        -(4 / tau) * sigmoid(tau * (r - 1)) * A,    tau = tau_positive if A > 0 else tau_negative

    The weight of the gradient is 1 at r = 1 (hence the 4) and fades on both sides; a larger tau fades faster. The value
    at r = 1 is -2A / tau, not -A.
    """
    advantages_BT = zero_masked(advantages_BT, mask_BT)
    is_positive_BT = advantages_BT > 0
    tau_BT = torch.where(is_positive_BT, advantages_BT.new_full((), tau_positive), tau_negative)
    # Past this bound the sigmoid is 1 to the last bit of a float64; without it exp would overflow and give 0 * inf.
    flat = math.log1p(100.0 / min(tau_positive, tau_negative))
    ratio_minus_1_BT = torch.expm1(_log_ratio(logprobs_BT, old_logprobs_BT, mask_BT).clamp(max=flat))
    return -(4.0 / tau_BT) * torch.sigmoid(tau_BT * ratio_minus_1_BT) * advantages_BT


def reinforce_loss(logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """-A * logprob per token (Williams 1992): the gradient is the policy gradient, the value means nothing.

    On-policy only. RLOO is this with leave_one_out_advantages and seq_mean_token_sum.
    """
    return -zero_masked(advantages_BT, mask_BT) * zero_masked(logprobs_BT, mask_BT)


def importance_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """exp(logprobs - old_logprobs) per token, with gradient; 1 where masked."""
    return torch.exp(_log_ratio(logprobs_BT, old_logprobs_BT, mask_BT))


@torch.no_grad()
def clipped_tokens(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Bool masks (low, high) of the tokens whose gradient clipped_policy_loss removed. Log their fractions separately.

    low: A < 0 and r < 1 - clip_low. high: A > 0 and r > 1 + clip_high. Never True where masked.
    """
    log_ratio_BT = _log_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    advantages_BT = zero_masked(advantages_BT, mask_BT)
    is_low_BT = (advantages_BT < 0) & (log_ratio_BT < _log(1 - clip_low))
    is_high_BT = (advantages_BT > 0) & (log_ratio_BT > _log(1 + clip_high))
    return is_low_BT, is_high_BT


@torch.no_grad()
def truncated_importance_weights(
    old_logprobs_BT: Tensor, sampling_logprobs_BT: Tensor, mask_BT: Tensor, *, level: Level, cap: float
) -> Tensor:
    """Detached weights min(w, cap) that correct for an engine that samples from a slightly different policy (TIS).

        token:     w_t = exp(old_logprob_t - sampling_logprob_t)
        sequence:  w = the product of w_t over the sequence, the same for each of its tokens

    Multiply the per-token loss by it (Yao et al. 2025; cap 2.0 in verl). old_logprobs are the trainer's, before this
    batch's updates: their ratio to the current logprobs is the surrogate's business. Shape (B, T), 0 where masked.
    """
    log_weights_BT = _mismatch(old_logprobs_BT, sampling_logprobs_BT, mask_BT, level)
    return zero_masked(torch.exp(log_weights_BT.clamp(max=_log(cap))), mask_BT)


@torch.no_grad()
def masked_importance_weights(
    old_logprobs_BT: Tensor, sampling_logprobs_BT: Tensor, mask_BT: Tensor, *, level: Level, low: float, high: float
) -> Tensor:
    """As truncated_importance_weights, but a weight outside [low, high] becomes 0 instead of being cut.

    Tokens (IcePop, level "token") or whole sequences (MIS, level "sequence") that the trainer's policy would hardly
    have produced are dropped. They still count in the denominator. verl: [0.5, 2.0]; TRL: sequences, [0, 3.0].
    """
    log_weights_BT = _mismatch(old_logprobs_BT, sampling_logprobs_BT, mask_BT, level)
    is_kept_BT = mask_BT & (log_weights_BT >= _log(low)) & (log_weights_BT <= _log(high))
    return zero_masked(torch.exp(zero_masked(log_weights_BT, is_kept_BT)), is_kept_BT)


@torch.no_grad()
def effective_sample_fraction(log_weights_N: Tensor) -> Tensor:
    """Effective sample size over n, in (0, 1]: (sum w)^2 / (n * sum w^2), from the logs of the weights.

    1 on-policy; exp(-s^2) for log-weights of variance s^2. Below 0.3 importance weights no longer help.
    """
    weights_N = torch.exp(log_weights_N - log_weights_N.max())
    return weights_N.sum().square() / (weights_N.square().sum() * weights_N.numel())


def overlong_penalty(lengths_B: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft punishment of length, in [-1, 0], to be ADDED to a reward of +-1 (Yu et al. 2025, eq. 13).

        0 up to max_length - buffer, then linearly down to -1 at max_length, and -1 beyond

    Halve it for rewards of 0 and 1. Lengths in tokens; float32.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the overlong buffer must lie in [1, {max_length}] tokens, not {buffer}")
    return ((max_length - buffer - lengths_B).to(torch.float32) / buffer).clamp(-1.0, 0.0)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    return zero_masked(logprobs_BT, mask_BT) - zero_masked(old_logprobs_BT, mask_BT)


def _mismatch(old_logprobs_BT: Tensor, sampling_logprobs_BT: Tensor, mask_BT: Tensor, level: Level) -> Tensor:
    log_weights_BT = _log_ratio(old_logprobs_BT, sampling_logprobs_BT, mask_BT)
    if level == "token":
        return log_weights_BT
    return sequence_sum(log_weights_BT, mask_BT).unsqueeze(-1).expand_as(mask_BT)


def _pessimistic(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """-min(r A, clip(r) A) written as -A * clip_A(r): the minimum bounds r above if A >= 0 and below if A < 0.

    Clamping before exp keeps a clipped token's gradient exactly 0 where exp would overflow and give 0 * inf.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be > 1, not {dual_clip}: it bounds the ratio of tokens with A < 0 from above")
    bounded_above = log_ratio.clamp(max=math.log1p(clip_high))
    bounded_below = log_ratio.clamp(min=_log(1 - clip_low), max=None if dual_clip is None else math.log(dual_clip))
    return -advantages * torch.exp(torch.where(advantages >= 0, bounded_above, bounded_below))
