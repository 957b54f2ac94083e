"""From scored completions to what PPO learns from: a reward, an advantage and a return for every token.

Shape suffixes: B completions, T label positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strop.models import CausalLM
from strop.objectives.advantages import gae, token_rewards, whiten
from strop.objectives.aggregate import sequence_sum
from strop.objectives.kl import kl_k1, kl_k3
from strop.objectives.value import explained_variance
from strop.rollouts.batch import RolloutBatch, collate_rollouts
from strop.rollouts.groups import Group
from strop.rollouts.logprobs import frozen_logprobs
from strop.stages.ppo_config import Config
from strop.stages.ppo_critic import Critic


def make_batch(
    policy: CausalLM,
    critic: Critic,
    reference: CausalLM | None,
    groups: Sequence[Group],
    config: Config,
    *,
    kl_coef: float,
) -> tuple[RolloutBatch, list[bool], dict[str, float]]:
    """The completions with advantages and returns per token; which rows count (were judged); and their figures."""
    batch = collate_rollouts(
        [group.prompt_ids for group in groups],
        [group.completions for group in groups],
        device=policy.device,
    )
    options = {"temperature": config.sampling.temperature, "max_tokens": config.micro_batch_tokens}
    if config.needs_old_logprobs:
        batch = batch.replace(old_logprobs_BT=frozen_logprobs(policy, batch, **options))
    if reference is not None:
        batch = batch.replace(ref_logprobs_BT=frozen_logprobs(reference, batch, **options))
    values_BT = critic.frozen_values(policy, batch, max_tokens=config.micro_batch_tokens)
    scores = [score for group in groups for score in group.scores]
    is_counted_B = torch.tensor([score.is_valid for score in scores], device=values_BT.device)
    mask_BT = batch.response_mask_BT & is_counted_B[:, None]
    rewards_B = sequence_rewards(groups, config).to(values_BT.device)
    metrics: dict[str, float] = {}
    kl_BT = torch.zeros_like(values_BT)
    if batch.old_logprobs_BT is not None and batch.ref_logprobs_BT is not None:
        kl_BT = kl_k1(batch.old_logprobs_BT, batch.ref_logprobs_BT, mask_BT)
        k3_BT = kl_k3(batch.old_logprobs_BT, batch.ref_logprobs_BT, mask_BT)
        if is_counted_B.any():
            metrics["kl"] = float(k3_BT[mask_BT].mean())
            metrics["kl_sequence"] = float(sequence_sum(kl_BT, mask_BT)[is_counted_B].mean())
        metrics["kl_coef"] = kl_coef
    in_reward = kl_coef if config.kl_placement == "reward" else 0.0
    rewards_BT = token_rewards(rewards_B, kl_BT, mask_BT, kl_coef=in_reward)
    penalised_B = sequence_sum(rewards_BT, mask_BT)
    if config.whiten_rewards:
        rewards_BT = whitened(rewards_BT, mask_BT, shift_mean=False)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, gae_lambda=config.gae_lambda)
    _, earned_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, gae_lambda=1.0)
    if is_counted_B.any():
        metrics |= {
            "reward_penalised": float(penalised_B[is_counted_B].mean()),
            "explained_variance": explained_variance(values_BT, earned_BT, mask_BT),
            **_mean_and_std("value", values_BT[mask_BT]),
            **_mean_and_std("return", returns_BT[mask_BT]),
            **_mean_and_std("advantage", advantages_BT[mask_BT]),
        }
    if config.whiten_advantages:
        advantages_BT = whitened(advantages_BT, mask_BT, shift_mean=True)
    batch = batch.replace(values_BT=values_BT, returns_BT=returns_BT, advantages_BT=advantages_BT)
    return batch, is_counted_B.tolist(), metrics


def sequence_rewards(groups: Sequence[Group], config: Config) -> Tensor:
    """The reward of each completion, (B,) float32, with the rule for those that did not stop.

    Whether one stopped is what the engine says of any of its stops; the tokenizer's EOS is only one of them.
    """
    rewards: list[float] = []
    for group in groups:
        for score, completion in zip(group.scores, group.completions, strict=True):
            reward = score.reward if score.is_valid else 0.0
            if completion.finish_reason == "length" and config.missing_eos != "keep":
                reward = (reward if config.missing_eos == "subtract" else 0.0) - config.missing_eos_penalty
            rewards.append(reward)
    return torch.tensor(rewards)


def whitened(values_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool) -> Tensor:
    """advantages.whiten, but values that are all equal have nothing to scale: what rounding leaves of them, blown up by
    whitening, would be a full step of Adam."""
    counted = values_BT[mask_BT]
    if len(counted) < 2 or bool((counted == counted[0]).all()):
        return torch.zeros_like(values_BT) if shift_mean else values_BT
    return whiten(values_BT, mask_BT, shift_mean=shift_mean)


def _mean_and_std(name: str, values_N: Tensor) -> dict[str, float]:
    values_N = values_N.double()
    return {f"{name}_mean": float(values_N.mean()), f"{name}_std": float(values_N.std(correction=0))}
