"""PPO's losses on one micro-batch: clipped surrogate, entropy, KL, and the critic's regression; and what they log.

Shape suffixes: B completions, T label positions, R counting labels, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from strop.models import CausalLM
from strop.models.logprobs import label_logprobs
from strop.objectives.aggregate import masked_sum
from strop.objectives.kl import kl_k2, kl_k3, kl_k3_plus
from strop.objectives.policy_gradient import clipped_policy_loss, clipped_tokens
from strop.objectives.value import value_is_clipped, value_loss
from strop.rollouts.averages import Averages, add_engine_gap
from strop.rollouts.batch import RolloutBatch
from strop.rollouts.logprobs import rectangular
from strop.stages.ppo_config import SHARED_VALUE_COEF, Config
from strop.stages.ppo_critic import Critic
from strop.types import PackedBatch


def micro_losses(
    policy: CausalLM,
    critic: Critic,
    micro: RolloutBatch,
    config: Config,
    *,
    kl_coef: float,
    num_tokens: int,
    trains_policy: bool,
    averages: Averages,
) -> Iterator[Tensor]:
    """This micro-batch's share of the update's losses, one per network. Call backward on each before taking the next:
    then only one network's activations are held at a time.
    """
    packed = micro.packed()
    if critic.head is not None:
        hidden_and_head = policy.hidden_and_head(packed)
        coef = SHARED_VALUE_COEF if config.critic.value_coef is None else config.critic.value_coef
        loss = policy_loss(policy, hidden_and_head, packed, micro, config, kl_coef, num_tokens, averages)
        values_R = critic.head_values_R(hidden_and_head[0], packed)
        yield loss + coef * critic_loss(values_R, micro, config, num_tokens, averages)
        return
    if trains_policy:
        yield policy_loss(policy, policy.hidden_and_head(packed), packed, micro, config, kl_coef, num_tokens, averages)
    yield critic_loss(critic.own_values_R(packed), micro, config, num_tokens, averages)


def policy_loss(
    policy: CausalLM,
    hidden_and_head: tuple[Tensor, Tensor],
    packed: PackedBatch,
    micro: RolloutBatch,
    config: Config,
    kl_coef: float,
    num_tokens: int,
    averages: Averages,
) -> Tensor:
    """The sum over the micro-batch's tokens of surrogate - entropy bonus (+ KL), over the update's num_tokens."""
    mask_BT = micro.response_mask_BT
    assert micro.advantages_BT is not None
    logprobs_R, entropy_R = label_logprobs(
        policy, hidden_and_head, packed, temperature=config.sampling.temperature, with_entropy=True
    )
    assert entropy_R is not None
    logprobs_BT, entropy_BT = rectangular(logprobs_R, micro), rectangular(entropy_R, micro)
    # With a single update per rollout the policy has not moved yet: these are the old logprobs.
    old_BT = logprobs_BT.detach() if micro.old_logprobs_BT is None else micro.old_logprobs_BT
    bounds = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    loss_BT = clipped_policy_loss(logprobs_BT, old_BT, micro.advantages_BT, mask_BT, **bounds)
    if config.entropy_coef:
        loss_BT = loss_BT - config.entropy_coef * entropy_BT
    if config.kl_placement == "loss" and micro.ref_logprobs_BT is not None:
        estimator = {"k2": kl_k2, "k3": kl_k3, "k3_plus": kl_k3_plus}[config.kl_estimator]
        loss_BT = loss_BT + kl_coef * estimator(logprobs_BT, micro.ref_logprobs_BT, mask_BT)
    with torch.no_grad():
        ratio_BT = (logprobs_BT - old_BT).exp()
        averages.add("entropy", entropy_BT, mask_BT)
        averages.add("ratio", ratio_BT, mask_BT)
        averages.maximum("ratio_max", ratio_BT, mask_BT)
        # How far the updates went from the policy that sampled; k3 of the sampling policy against the present one.
        averages.add("update_kl", kl_k3(old_BT, logprobs_BT.detach(), mask_BT), mask_BT)
        is_low_BT, is_high_BT = clipped_tokens(logprobs_BT, old_BT, micro.advantages_BT, mask_BT, **bounds)
        averages.add("clipped_low", is_low_BT, mask_BT)
        averages.add("clipped_high", is_high_BT, mask_BT)
        add_engine_gap(averages, old_BT, micro.sampling_logprobs_BT, mask_BT)
    return masked_sum(loss_BT, mask_BT, num_tokens)


def critic_loss(values_R: Tensor, micro: RolloutBatch, config: Config, num_tokens: int, averages: Averages) -> Tensor:
    """The sum of half squared errors over the update's num_tokens."""
    assert micro.values_BT is not None and micro.returns_BT is not None
    mask_BT = micro.response_mask_BT
    values_BT = rectangular(values_R, micro)
    clip = config.critic.clip if config.critic.clip < float("inf") else None
    loss_BT = value_loss(values_BT, micro.values_BT, micro.returns_BT, mask_BT, clip=clip)
    averages.add("value_loss", loss_BT, mask_BT)
    if clip is not None:
        is_clipped_BT = value_is_clipped(values_BT, micro.values_BT, micro.returns_BT, mask_BT, clip=clip)
        averages.add("value_clipped", is_clipped_BT, mask_BT)
    return masked_sum(loss_BT, mask_BT, num_tokens)
