"""Losses over preference pairs, one value per pair (KTO: per completion); no reward model, no sampling.

A logratio is logprob(completion | prompt) under the policy minus the same under the reference, summed over the
completion's tokens (the stop token included, the prompt not): aggregate.sequence_sum. "mean" arguments are averages
over those tokens instead: aggregate.sequence_mean. The two are never interchangeable: a beta tuned for sums is wrong
for means. With D = chosen_logratio - rejected_logratio, at policy = reference D = 0 and DPO's loss is log 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def dpo_loss(chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta * D) (Rafailov et al. 2023, eq. 7); beta 0.1, learning rates near 5e-7.

    The trap to watch: both logprobs may fall while D grows. Log them separately.
    """
    return -logsigmoid(beta * (chosen_logratios_B - rejected_logratios_B))


def cdpo_loss(
    chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float, flip_probability: float
) -> Tensor:
    """-(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), e the chance that a label is flipped (Mitchell 2023).

    Conservative: the optimum has a finite D instead of an infinite one.
    """
    _check_flip_probability(flip_probability)
    logits_B = beta * (chosen_logratios_B - rejected_logratios_B)
    return -(1 - flip_probability) * logsigmoid(logits_B) - flip_probability * logsigmoid(-logits_B)


def robust_dpo_loss(
    chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float, flip_probability: float
) -> Tensor:
    """[-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1 - 2e) (Chowdhury et al. 2024).

    Its mean over flipped labels is the clean DPO loss: unbiased, so it may be negative. cDPO has the other sign.
    """
    _check_flip_probability(flip_probability)
    logits_B = beta * (chosen_logratios_B - rejected_logratios_B)
    loss_B = -(1 - flip_probability) * logsigmoid(logits_B) + flip_probability * logsigmoid(-logits_B)
    return loss_B / (1 - 2 * flip_probability)


def ipo_loss(chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float) -> Tensor:
    """(D - 1 / (2 beta))^2 (Azar et al. 2024, eq. 17): regress the gap to a finite target; 25 at D = 0, beta 0.1.

    The paper's formula with sums; its authors and TRL use mean logratios, for which beta means something else.
    """
    return (chosen_logratios_B - rejected_logratios_B - 1 / (2 * beta)).square()


def hinge_loss(chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta * D) (SLiC; Zhao et al. 2023): no gradient once the margin is reached."""
    return relu(1 - beta * (chosen_logratios_B - rejected_logratios_B))


def sigmoid_norm_loss(
    chosen_logratios_B: Tensor,
    rejected_logratios_B: Tensor,
    chosen_lengths_B: Tensor,
    rejected_lengths_B: Tensor,
    *,
    beta: float,
) -> Tensor:
    """DPO on length-averaged logratios: -log sigmoid(beta * (chosen / |chosen| - rejected / |rejected|)).

    Lengths in tokens. A longer answer no longer gets a larger gap for free; beta must be larger than DPO's.
    """
    return dpo_loss(chosen_logratios_B / chosen_lengths_B, rejected_logratios_B / rejected_lengths_B, beta=beta)


def kto_baseline(mismatched_logratios_N: Tensor) -> Tensor:
    """KTO's reference point z = max(0, mean), detached scalar, an estimate of KL(policy || reference).

    The logratios are of completions paired with the WRONG prompt of the batch. With fewer than 4 it is noise.
    """
    return mismatched_logratios_N.detach().mean().clamp(min=0)


def kto_loss(
    logratios_B: Tensor,
    is_desirable_B: Tensor,
    baseline: float | Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Loss of single completions labelled good (True) or bad, no pairs needed (Ethayarajh et al. 2024).

        good: w_D * (1 - sigmoid(beta * (h - z))),    bad: w_U * (1 - sigmoid(beta * (z - h)))

    Choose the weights so that w_D * num_good / (w_U * num_bad) lies in [1, 4/3]. 0.5 at policy = reference.
    """
    distance_B = logratios_B - baseline
    signed_B = torch.where(is_desirable_B, distance_B, -distance_B)
    loss_B = torch.sigmoid(-beta * signed_B)
    return torch.where(is_desirable_B, desirable_weight * loss_B, undesirable_weight * loss_B)


def orpo_loss(chosen_mean_logprobs_B: Tensor, rejected_mean_logprobs_B: Tensor, *, beta: float) -> Tensor:
    """SFT on the chosen answer plus a log-odds-ratio penalty, without a reference (Hong et al. 2024, eq. 6-7).

        -mean_logprob_c - beta * log sigmoid(log_odds_c - log_odds_r),    log_odds = log p - log(1 - p)

    p is the geometric mean over tokens, exp(mean logprob): with sums p underflows and the loss explodes. beta is the
    paper's lambda, 0.1.
    """
    difference_B = _log_odds(chosen_mean_logprobs_B) - _log_odds(rejected_mean_logprobs_B)
    return -chosen_mean_logprobs_B - beta * logsigmoid(difference_B)


def simpo_loss(
    chosen_mean_logprobs_B: Tensor, rejected_mean_logprobs_B: Tensor, *, beta: float, margin: float
) -> Tensor:
    """-log sigmoid(beta * (mean_logprob_c - mean_logprob_r) - margin), without a reference (Meng et al. 2024, eq. 6).

    margin is the paper's gamma, absolute: it is not multiplied by beta. Published: beta 2.0 to 2.5, gamma / beta 0.3
    to 0.5.
    """
    return -logsigmoid(beta * (chosen_mean_logprobs_B - rejected_mean_logprobs_B) - margin)


def apo_zero_loss(chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float) -> Tensor:
    """1 - sigmoid(beta h_c) + sigmoid(beta h_r): raise chosen, lower rejected (D'Oosterlinck et al. 2024).

    For chosen answers that are better than what the policy writes. 1 at policy = reference.
    """
    return torch.sigmoid(-beta * chosen_logratios_B) + torch.sigmoid(beta * rejected_logratios_B)


def apo_down_loss(chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float) -> Tensor:
    """sigmoid(beta h_c) + 1 - sigmoid(beta D): lower both, rejected more (D'Oosterlinck et al. 2024).

    For chosen answers that are worse than what the policy writes; with any others it unlearns them.
    """
    return torch.sigmoid(beta * chosen_logratios_B) + torch.sigmoid(beta * (rejected_logratios_B - chosen_logratios_B))


def bco_loss(
    chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float, shift: float | Tensor = 0.0
) -> Tensor:
    """-log sigmoid(beta h_c - shift) - log sigmoid(-(beta h_r - shift)): a classifier of good and bad (Jung 2024).

    shift is the running mean of the rewards beta * h over both halves (the caller keeps it); 0 is TRL's "bco_pair".
    2 log 2 at policy = reference.
    """
    return -logsigmoid(beta * chosen_logratios_B - shift) - logsigmoid(shift - beta * rejected_logratios_B)


def bco_unpaired_loss(
    logratios_B: Tensor, is_desirable_B: Tensor, *, beta: float, shift: float | Tensor = 0.0
) -> Tensor:
    """bco_loss of single completions labelled good (True) or bad: -log sigmoid(+-(beta h - shift)) (Jung 2024, eq. 9).

    log 2 at policy = reference; a pair's loss is the sum of its two.
    """
    rewards_B = beta * logratios_B - shift
    return -logsigmoid(torch.where(is_desirable_B, rewards_B, -rewards_B))


def sppo_loss(chosen_logratios_B: Tensor, rejected_logratios_B: Tensor, *, beta: float) -> Tensor:
    """(h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2, with hard win rates of 1 and 0 (SPPO; Wu et al. 2024).

    Unlike IPO both logratios have their own target, so the chosen logprob cannot fall along with the rejected one.
    """
    target = 1 / (2 * beta)
    return (chosen_logratios_B - target).square() + (rejected_logratios_B + target).square()


def _check_flip_probability(flip_probability: float) -> None:
    if not 0 <= flip_probability < 0.5:
        raise ValueError(f"flip_probability must lie in [0, 0.5), not {flip_probability}")


def _log_odds(mean_logprobs_B: Tensor) -> Tensor:
    """log p - log(1 - p) for log p <= 0, exact at both ends."""
    # A probability that rounds to 1 has infinite odds; one ulp below it they are large and finite.
    log_p_B = mean_logprobs_B.clamp(max=-torch.finfo(mean_logprobs_B.dtype).eps)
    return log_p_B - torch.log(-torch.expm1(log_p_B))
