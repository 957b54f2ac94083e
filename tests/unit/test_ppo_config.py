"""Everything that ppo.Config refuses, each with a message that names the field and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.stages.held_out import Evaluation
from strop.stages.ppo_config import Config, CriticConfig, PtxConfig

GOOD: dict[str, Any] = {
    "init_from": "base",
    "tasks": "tasks.jsonl",
    "rewards": (RewardConfig(name="math"),),
    "num_steps": 10,
}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rewards": ()}, 'rewards is empty: name at least one, for example rewards = [{ name = "math" }]'),
    ({"sampling": Sampling(temperature=0.0)}, "sampling.temperature must be above 0: greedy samples explore nothing"),
    ({"sampling": Sampling(max_new_tokens=0)}, "sampling.max_new_tokens=0 must be at least 1"),
    ({"gamma": 1.1}, "gamma=1.1 must lie between 0 and 1"),
    ({"gae_lambda": -0.1}, "gae_lambda=-0.1 must lie between 0 and 1"),
    ({"gae_lambda": float("nan")}, "gae_lambda=nan must lie between 0 and 1"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0 must be at least 0: it is taken away"),
    ({"kl_estimator": "k3"}, 'kl_placement = "reward" needs kl_estimator = "k1"'),
    ({"kl_placement": "loss"}, "k1 in the loss has no effect on average: use kl_estimator ="),
    ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target adapts kl_coef, which is 0 and would stay so: set kl_coef"),
    ({"kl_target": 0.0}, "kl_target=0.0 must be above 0"),
    ({"kl_target": 6.0, "kl_horizon": 63}, "kl_horizon=63 at least the 64 completions of a step"),
    ({"minibatch_prompts": 48}, "prompts_per_step=64 is not divisible by minibatch_prompts=48"),
    ({"critic": CriticConfig(clip=0.0)}, "critic.clip=0.0 must be above 0; inf never clips"),
    ({"critic": CriticConfig(lr=-1.0)}, "critic.lr=-1.0 must be a number of at least 0"),
    ({"critic": CriticConfig(lr=float("nan"))}, "critic.lr=nan must be a number of at least 0"),
    ({"critic": CriticConfig(warmup_steps=-1)}, "critic.warmup_steps=-1 must be at least 0"),
    ({"critic": CriticConfig(value_coef=0.1)}, "critic.value_coef weighs the losses of a shared trunk"),
    ({"critic": CriticConfig(network="shared", value_coef=-0.1)}, "critic.value_coef=-0.1 must be a number of"),
    ({"critic": CriticConfig(network="shared", start="rm")}, "critic.start, critic.lr and critic.warmup_steps are for"),
    ({"critic": CriticConfig(network="shared", lr=1e-3)}, "critic.start, critic.lr and critic.warmup_steps are for"),
    ({"critic": CriticConfig(network="shared", warmup_steps=1)}, 'are for critic.network = "own"'),
    ({"ptx": PtxConfig(coef=2.0)}, "ptx has settings but no data: set ptx.data, or remove the others"),
    ({"ptx": PtxConfig(data="a.jsonl", coef=0.0)}, "ptx.coef=0.0 must be above 0; leave ptx.data out for none"),
    ({"ptx": PtxConfig(data="a.jsonl", max_length=1)}, "ptx.max_length=1 must be at least 2"),
    ({"ptx": PtxConfig(data="a.jsonl", batch_tokens=512)}, "ptx.max_length=1024 exceeds ptx.batch_tokens=512"),
    ({"ptx": PtxConfig(data="a.jsonl"), "micro_batch_tokens": 512}, "or micro_batch_tokens=512"),
    ({"optimizer": OptimizerConfig(lr=1e-3, warmup_steps=11)}, "warmup_steps = 11 does not lie between 0 and the 10"),
    ({"optimizer": OptimizerConfig(lr=1e-3, max_grad_norm=0)}, "optimizer.max_grad_norm=0 must be above 0"),
    ({"eval": Evaluation(every=0)}, "eval.every=0 must be at least 1"),
]
ONE_OR_MORE = (
    *("num_steps", "prompts_per_step", "group_size", "epochs_per_rollout"),
    *("micro_batch_tokens", "num_slots", "save_every", "keep_checkpoints"),
)
ZERO_OR_MORE = ("clip_low", "clip_high", "kl_coef", "minibatch_prompts", "samples_per_step", "seed")
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
        {"kl_coef": 0.15, "kl_target": 6.0, "whiten_rewards": True, "missing_eos": "replace"},
        {"kl_coef": 0.02, "epochs_per_rollout": 1, "minibatch_prompts": 8, "ptx": PtxConfig(data="a.jsonl", coef=27.8)},
        {"kl_coef": 0.1, "kl_placement": "loss", "kl_estimator": "k3_plus"},
        {"critic": CriticConfig(network="shared", value_coef=0.5, clip=float("inf"))},
        {"critic": CriticConfig(start="rm", lr=1e-5, warmup_steps=10), "kl_coef": 0.0},
    ],
    ids=str,
)
def test_accepts_the_published_combinations(change: dict[str, Any]) -> None:
    config = Config(**{**GOOD, **change})
    assert all(getattr(config, field) == value for field, value in change.items())


def test_old_logprobs_are_needed_when_updates_share_a_rollout_or_there_is_a_kl() -> None:
    config = Config(**GOOD, epochs_per_rollout=1, kl_coef=0.0)
    assert not config.needs_old_logprobs
    assert not dataclasses.replace(config, minibatch_prompts=64).needs_old_logprobs
    for change in ({"minibatch_prompts": 32}, {"epochs_per_rollout": 2}, {"kl_coef": 0.1}):
        assert dataclasses.replace(config, **change).needs_old_logprobs, change


def test_the_critic_has_the_policys_optimizer_but_for_its_rate() -> None:
    optimizer = OptimizerConfig(lr=1e-6, schedule="linear", warmup_steps=2, max_grad_norm=0.5)
    config = Config(**GOOD, optimizer=optimizer)
    assert config.critic_optimizer == optimizer
    config = dataclasses.replace(config, critic=CriticConfig(lr=1e-5))
    assert config.critic_optimizer == dataclasses.replace(optimizer, lr=1e-5)


def test_describe_names_every_choice() -> None:
    text = Config(
        **GOOD,
        kl_target=6.0,
        gae_lambda=0.9,
        minibatch_prompts=16,
        missing_eos="replace",
        ptx=PtxConfig(data="books.txt", coef=27.8),
        critic=CriticConfig(network="shared"),
    ).describe()
    for part in (
        *("64 prompts x 1 samples", "critic shared", "lambda 0.9", "KL 0.05 k1 in the reward"),
        *("adapted to 6.0 nats per completion", "missing EOS replace", "4 epoch(s) of 16", "ptx 27.8 of books.txt"),
    ):
        assert part in text
