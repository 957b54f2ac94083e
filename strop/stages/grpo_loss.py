"""The loss of GRPO and its relatives on one micro-batch: surrogate, engine correction, entropy, KL; and what it logs.

Shape suffixes: B completions, T label positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.models import CausalLM
from strop.models.recording import Recording
from strop.objectives.aggregate import masked_sum, sequence_mean, token_weights
from strop.objectives.kl import kl_k2, kl_k3, kl_k3_plus
from strop.objectives.policy_gradient import (
    cispo_loss,
    clipped_policy_loss,
    clipped_tokens,
    gspo_token_loss,
    masked_importance_weights,
    reinforce_loss,
    sapo_loss,
    truncated_importance_weights,
)
from strop.rollouts.averages import Averages, add_engine_gap
from strop.rollouts.batch import RolloutBatch
from strop.rollouts.logprobs import token_logprobs
from strop.stages.grpo_config import Config


def micro_loss(
    policy: CausalLM,
    micro: RolloutBatch,
    config: Config,
    denominator: int,
    averages: Averages,
    recording: Recording | None = None,
) -> Tensor:
    """This micro-batch's share of the update's loss. recording: see token_logprobs."""
    mask_BT = micro.response_mask_BT
    assert micro.advantages_BT is not None
    logprobs_BT, entropy_BT = token_logprobs(
        policy, micro, temperature=config.sampling.temperature, with_entropy=True, recording=recording
    )
    assert entropy_BT is not None
    # With a single update per rollout the policy has not moved yet: these are the old logprobs.
    old_BT = logprobs_BT.detach() if micro.old_logprobs_BT is None else micro.old_logprobs_BT
    loss_BT = surrogate(logprobs_BT, old_BT, micro.advantages_BT, mask_BT, config)
    if config.importance_correction != "none":
        weights_BT = importance_weights(old_BT, micro.sampling_logprobs_BT, mask_BT, config)
        loss_BT = loss_BT * weights_BT
        averages.add("importance_weight", weights_BT, mask_BT)
    if config.entropy_coef:
        loss_BT = loss_BT - config.entropy_coef * entropy_BT
    if micro.ref_logprobs_BT is not None:
        if config.kl_placement == "loss":
            estimator = {"k2": kl_k2, "k3": kl_k3, "k3_plus": kl_k3_plus}[config.kl_estimator]
            loss_BT = loss_BT + config.kl_coef * estimator(logprobs_BT, micro.ref_logprobs_BT, mask_BT)
        averages.add("kl", kl_k3(logprobs_BT.detach(), micro.ref_logprobs_BT, mask_BT), mask_BT)
    averages.add("entropy", entropy_BT, mask_BT)
    update_metrics(averages, logprobs_BT.detach(), old_BT, micro, config)
    return masked_sum(loss_BT, mask_BT, denominator, weights_BT=token_weights(mask_BT, config.aggregation))


def surrogate(logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, config: Config) -> Tensor:
    """The policy-gradient loss of each token, unreduced."""
    low, high = config.clip_low, config.clip_high
    if config.loss == "clip":
        return clipped_policy_loss(
            logprobs_BT, old_BT, advantages_BT, mask_BT, clip_low=low, clip_high=high, dual_clip=config.dual_clip
        )
    if config.loss == "sequence_clip":
        return gspo_token_loss(logprobs_BT, old_BT, advantages_BT, mask_BT, clip_low=low, clip_high=high)
    if config.loss == "cispo":
        return cispo_loss(logprobs_BT, old_BT, advantages_BT, mask_BT, ratio_max=1 + high, ratio_min=max(0.0, 1 - low))
    if config.loss == "sapo":
        return sapo_loss(logprobs_BT, old_BT, advantages_BT, mask_BT)
    return reinforce_loss(logprobs_BT, advantages_BT, mask_BT)


def importance_weights(old_BT: Tensor, sampling_BT: Tensor, mask_BT: Tensor, config: Config) -> Tensor:
    """What makes samples of the engine count as samples of the trainer's policy."""
    level, _, how = config.importance_correction.partition("_")
    assert level in ("token", "sequence")
    cap = config.importance_cap
    if how == "truncate":
        return truncated_importance_weights(old_BT, sampling_BT, mask_BT, level=level, cap=cap)
    return masked_importance_weights(old_BT, sampling_BT, mask_BT, level=level, low=1 / cap, high=cap)


@torch.no_grad()
def update_metrics(
    averages: Averages, logprobs_BT: Tensor, old_BT: Tensor, micro: RolloutBatch, config: Config
) -> None:
    """How far the policy moved within this rollout, and how far the engine is from the trainer.

    clipped_*: tokens whose gradient the loss removed (clip, sequence_clip) or whose weight it bounded (cispo); other
    losses have none. ratio is the one that is clipped: with sequence_clip the sequence's.
    """
    mask_BT = micro.response_mask_BT
    assert micro.advantages_BT is not None
    log_ratio_BT = logprobs_BT - old_BT
    if config.loss == "sequence_clip":
        log_ratio_BT = sequence_mean(log_ratio_BT, mask_BT)[:, None].expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.exp()
    averages.add("ratio", ratio_BT, mask_BT)
    averages.maximum("ratio_max", ratio_BT, mask_BT)
    if config.loss in ("clip", "sequence_clip"):
        low, high = config.clip_low, config.clip_high
        zeros_BT = torch.zeros_like(log_ratio_BT)
        is_low_BT, is_high_BT = clipped_tokens(
            log_ratio_BT, zeros_BT, micro.advantages_BT, mask_BT, clip_low=low, clip_high=high
        )
        averages.add("clipped_low", is_low_BT, mask_BT)
        averages.add("clipped_high", is_high_BT, mask_BT)
    elif config.loss == "cispo":
        averages.add("clipped_low", ratio_BT < 1 - config.clip_low, mask_BT)
        averages.add("clipped_high", ratio_BT > 1 + config.clip_high, mask_BT)
    if config.dual_clip is not None:
        averages.add("clipped_dual", (ratio_BT > config.dual_clip) & (micro.advantages_BT < 0), mask_BT)
    add_engine_gap(averages, old_BT, micro.sampling_logprobs_BT, mask_BT)
