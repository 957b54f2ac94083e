"""What DPO logs of a step and of held-out data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from strop.data import Comparison
from strop.evals.comparisons import comparison_metrics
from strop.models import CausalLM
from strop.stages.dpo_config import Config
from strop.stages.dpo_loss import Answers, Baselines, frozen_sums, implicit_rewards
from strop.stages.dpo_reference import Reference


def preference_metrics(
    batch: Sequence[Comparison], answers: Answers, baselines: Baselines, config: Config
) -> dict[str, float]:
    """What the policy thought of the answers before the update. Both logprobs falling while the margin grows is DPO's
    usual trap, so the best and the worst answers' are told apart."""
    rewards = implicit_rewards(answers, config).cpu().double().numpy()
    logprobs = (answers.logprobs_A / answers.lengths_A).cpu().double().numpy()
    ends = np.cumsum([len(comparison.answers) for comparison in batch])
    if all(comparison.label is not None for comparison in batch):
        is_good = np.array([bool(comparison.label) for comparison in batch])
        threshold = baselines.bco_shift if config.loss == "bco" else config.beta * baselines.kto
        found = {"accuracy": float(((rewards > threshold) == is_good).mean())}
        sides = {"chosen": is_good, "rejected": ~is_good}
    else:
        scores = np.split(rewards, ends[:-1])
        # At the very beginning every reward is 0, up to rounding, and the accuracy that of a coin.
        metrics = comparison_metrics(batch, scores)
        found = {name: metrics[name] for name in ("accuracy", "margin")}
        ranks = np.concatenate([comparison.ranks for comparison in batch])
        last = np.concatenate([[comparison.ranks[-1]] * len(comparison.ranks) for comparison in batch])
        sides = {"chosen": ranks == 0, "rejected": ranks == last}
    for side, is_in in sides.items():
        if is_in.any():
            found |= {f"reward_{side}": float(rewards[is_in].mean()), f"logprob_{side}": float(logprobs[is_in].mean())}
    if config.loss == "kto":
        found["kto_baseline"] = baselines.kto
    return found | {"reward_mean": float(rewards.mean())}


def evaluate_preferences(
    policy: CausalLM,
    reference: Reference | None,
    held_out: Sequence[Comparison],
    config: Config,
    *,
    prefers_longer: bool | None,
    bco_shift: float,
) -> dict[str, float]:
    """How often the policy's implicit rewards agree with held-out preferences, as eval/NAME."""
    options = {"temperature": config.temperature, "max_tokens": config.micro_batch_tokens}
    sums = frozen_sums(policy, held_out, **options)
    refs = None if reference is None else reference.sums(held_out, "eval")
    answers = Answers(
        logprobs_A=torch.from_numpy(np.concatenate(sums)),
        ref_logprobs_A=None if refs is None else torch.from_numpy(np.concatenate(refs)),
        lengths_A=torch.tensor([float(sum(answer.mask)) for item in held_out for answer in item.answers]),
    )
    baselines = Baselines(bco_shift=bco_shift)
    metrics = preference_metrics(held_out, answers, baselines, config)
    if held_out[0].label is None:
        rewards = implicit_rewards(answers, config).double().numpy()
        scores = np.split(rewards, np.cumsum([len(item.answers) for item in held_out])[:-1])
        found = comparison_metrics(held_out, scores, prefers_longer=prefers_longer)
        metrics |= {
            name: found[name]
            for name in ("accuracy_low", "accuracy_high", "accuracy_length_only", "accuracy_chosen_shorter")
            if name in found
        }
    return {f"eval/{name}": value for name, value in metrics.items()}
