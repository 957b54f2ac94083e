"""Everything that grpo.Config refuses, each with a message that names the field and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.stages.grpo_config import Config, Evaluation

GOOD: dict[str, Any] = {
    "init_from": "base",
    "tasks": "tasks.jsonl",
    "rewards": (RewardConfig(name="math"),),
    "num_steps": 10,
}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rewards": ()}, 'rewards is empty: name at least one, for example rewards = [{ name = "math" }]'),
    ({"sampling": Sampling(temperature=0.0)}, "sampling.temperature must be above 0: greedy samples of one prompt"),
    ({"sampling": Sampling(temperature=float("nan"))}, "sampling.temperature must be above 0"),
    ({"sampling": Sampling(max_new_tokens=0)}, "sampling.max_new_tokens=0 must be at least 1"),
    ({"group_size": 1}, 'advantage = "group" needs group_size >= 2 (or use advantage = "batch")'),
    (
        {"group_size": 1, "advantage": "leave_one_out", "advantage_scale": "none"},
        'advantage = "leave_one_out" needs group_size >= 2',
    ),
    ({"loss": "cispo", "dual_clip": 3.0}, 'dual_clip only acts on loss = "clip", not on "cispo": remove it'),
    ({"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
    ({"loss": "reinforce", "epochs_per_rollout": 2}, 'loss = "reinforce" has no ratio'),
    ({"advantage": "batch", "advantage_scale": "none"}, 'advantage = "batch" always divides by the batch'),
    ({"advantage": "leave_one_out"}, 'advantage = "leave_one_out" is not scaled: set advantage_scale = "none"'),
    ({"kl_coef": 0.1, "kl_placement": "reward"}, 'kl_placement = "reward" needs kl_estimator = "k1"'),
    ({"kl_coef": 0.1, "kl_estimator": "k1"}, "k1 in the loss has no effect on average: use kl_estimator ="),
    ({"reference_refresh_steps": 5}, "reference_refresh_steps has no effect without kl_coef: set kl_coef, or remove"),
    (
        {"overlong_buffer": 257},
        "overlong_buffer=257 is longer than sampling.max_new_tokens=256: lower it",
    ),
    ({"minibatch_prompts": 3}, "prompts_per_step=8 is not divisible by minibatch_prompts=3"),
    ({"minibatch_prompts": 16}, "prompts_per_step=8 is not divisible by minibatch_prompts=16"),
    ({"group_size": 1, "advantage": "batch", "dynamic_sampling": True}, "dynamic_sampling needs group_size >= 2"),
    ({"importance_cap": 0.5}, "importance_cap=0.5 must be at least 1"),
    ({"optimizer": OptimizerConfig(lr=1e-3, warmup_steps=11)}, "warmup_steps = 11 does not lie between 0 and the 10"),
    ({"optimizer": OptimizerConfig(lr=-1e-3)}, "optimizer.lr=-0.001 must be at least 0"),
    ({"optimizer": OptimizerConfig(lr=float("inf"))}, "optimizer.lr=inf is not finite"),
    ({"optimizer": OptimizerConfig(lr=1e-3, max_grad_norm=0)}, "optimizer.max_grad_norm=0 must be above 0"),
    ({"optimizer": OptimizerConfig(lr=1e-3, max_skipped_steps=0)}, "optimizer.max_skipped_steps=0 must be at least 1"),
    ({"eval": Evaluation(every=0)}, "eval.every=0 must be at least 1"),
    ({"eval": Evaluation(num_samples=0)}, "eval.num_samples=0 must be at least 1"),
]
ONE_OR_MORE = (
    *("num_steps", "prompts_per_step", "group_size", "epochs_per_rollout", "max_sampling_rounds"),
    *("micro_batch_tokens", "num_slots", "save_every", "keep_checkpoints"),
)
ZERO_OR_MORE = ("clip_low", "clip_high", "kl_coef", "reference_refresh_steps", "minibatch_prompts", "overlong_buffer")
REFUSED += [({field: 0}, f"{field}=0 must be at least 1") for field in ONE_OR_MORE]
REFUSED += [({field: -1}, f"{field}=-1 must be at least 0") for field in ZERO_OR_MORE]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_refuses_what_cannot_be_honoured(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Config(**{**GOOD, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 1, "advantage": "batch"},
        {"advantage": "leave_one_out", "advantage_scale": "none", "loss": "reinforce"},
        {"kl_coef": 0.1, "kl_placement": "reward", "kl_estimator": "k1"},
        {"kl_coef": 0.1, "kl_estimator": "k3_plus", "reference_refresh_steps": 400},
        {"clip_high": 0.28, "dynamic_sampling": True, "overlong_buffer": 64, "mask_truncated": True},
        {"minibatch_prompts": 4, "epochs_per_rollout": 2, "dual_clip": 3.0},
        {"optimizer": OptimizerConfig(lr=1e-3, max_grad_norm=float("inf"))},
    ],
    ids=str,
)
def test_accepts_the_published_combinations(change: dict[str, Any]) -> None:
    config = Config(**{**GOOD, **change})
    assert all(getattr(config, field) == value for field, value in change.items())


def test_old_logprobs_are_needed_exactly_when_a_rollout_has_several_updates() -> None:
    config = Config(**GOOD)
    assert not config.updates_share_a_rollout
    assert not dataclasses.replace(config, minibatch_prompts=8).updates_share_a_rollout
    assert dataclasses.replace(config, minibatch_prompts=4).updates_share_a_rollout
    assert dataclasses.replace(config, epochs_per_rollout=2).updates_share_a_rollout


def test_describe_names_every_choice() -> None:
    text = Config(
        **GOOD, loss="cispo", aggregation="token_sum_norm", kl_coef=0.04, kl_estimator="k3", minibatch_prompts=4
    ).describe()
    for part in ("8 prompts x 8 samples", "cispo", "token_sum_norm", "KL 0.04 k3 in the loss", "1 epoch(s) of 4"):
        assert part in text
