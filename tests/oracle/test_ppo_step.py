"""One PPO step against gradients that transformers takes of whole, unpacked sequences, and what every option does.

The optimisers are Adam with an eps so large that the first update is minus the gradient, so that the change of the
weights is the gradient, whatever the step did to get there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from strop.data import Example, PackedBatches, TaskBatches
from strop.generation import Engine
from strop.models import load_model, save_model
from strop.models.heads import add_scalar_head, pack_scored, save_scalar_model
from strop.optim import OptimizerConfig, SkippedSteps
from strop.rewards.base import WeightedRewards
from strop.rewards.config import RewardConfig
from strop.rewards.function import FunctionReward
from strop.rollouts.averages import Averages
from strop.rollouts.batch import RolloutBatch
from strop.rollouts.groups import Group
from strop.rollouts.prompts import Sampling, encode_prompts
from strop.stages.ppo import Actors, Config, Position, ppo_step
from strop.stages.ppo_batch import make_batch, sequence_rewards
from strop.stages.ppo_config import CriticConfig, PtxConfig
from strop.stages.ppo_critic import Critic
from strop.stages.ppo_loss import micro_losses
from strop.tokenizer import Tokenizer
from strop.types import Task

SGD = OptimizerConfig(lr=1e6, eps=1e6, beta1=0.0, beta2=0.0, max_grad_norm=float("inf"))
"""g / (|g| + 1e6) * 1e6 = g to seven digits, for every |g| of this model."""
LETTERS = tuple("aeotusnrihlcdm .,")
"""Stop strings that a random model hits often, so that completions have all lengths."""
PLAIN: dict[str, Any] = {
    "gae_lambda": 1.0,
    "clip_low": 1.0,
    "clip_high": math.inf,
    "epochs_per_rollout": 1,
    "kl_coef": 0.0,
    "whiten_advantages": False,
    "critic": CriticConfig(clip=math.inf),
}
"""What makes PPO REINFORCE, as long as the critic expects nothing."""


def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


@dataclass
class Setup:
    config: Config
    actors: Actors
    position: Position
    folder: Path

    def step(self, number: int = 1) -> tuple[dict[str, float], list[Group], RolloutBatch]:
        return ppo_step(self.actors, self.position, self.config, number)

    def policy_weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.actors.policy.named_parameters()}

    def critic_weights(self) -> dict[str, Tensor]:
        critic = self.actors.critic.network or self.actors.critic.head
        assert critic is not None
        return {name: value.detach().clone() for name, value in critic.named_parameters()}

    def batch(self, groups: Sequence[Group]) -> tuple[RolloutBatch, list[bool], dict[str, float]]:
        actors = self.actors
        return make_batch(actors.policy, actors.critic, actors.reference, groups, self.config, kl_coef=0.05)


def setup(
    folder: Path,
    *,
    reward: Callable[..., list[float]] = judge,
    start: Path | None = None,
    critic_head: bool = False,
    ptx_batches: PackedBatches | None = None,
    stop_token_ids: Sequence[int] = (),
    **changes: Any,
) -> Setup:
    """Twelve completions of three prompts, unless told; the policy starts at `start`, the critic's head at zero, or at
    random with critic_head."""
    settings: dict[str, Any] = {
        "init_from": str(folder),
        "tasks": "",
        "rewards": (RewardConfig(name="judge"),),
        "num_steps": 100,
        "prompts_per_step": 3,
        "group_size": 4,
        "sampling": Sampling(max_new_tokens=6, stop=LETTERS),
        "optimizer": SGD,
        "dtype": "float32",
        "num_slots": 8,
    }
    config = Config(**{**settings, **changes})
    prompts = ["the quick", "cat", "brown fox jumps over", "dog and", "lazy", "sleeps the"]
    tasks = [Task(id=f"t:{i}", prompt=prompt, columns={"number": i}) for i, prompt in enumerate(prompts)]
    plain = Tokenizer.load(folder)
    tokenizer = Tokenizer(plain.hf, name="test", stop_token_ids=stop_token_ids) if stop_token_ids else plain
    policy = load_model(start or folder, dtype=torch.float32)
    if config.critic.network == "own":
        network = add_scalar_head(load_model(folder, dtype=torch.float32), seed=5)  # type: ignore[arg-type]
        if not critic_head:
            nn.init.zeros_(network.score.weight)
        critic = Critic(network=network, optimizer=config.critic_optimizer.build(network.named_parameters()))
    else:
        head = nn.Linear(32, 1, bias=False)
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(5)) if critic_head else nn.init.zeros_(
            head.weight
        )
        critic = Critic(head=head)
    actors = Actors(
        policy=policy,
        critic=critic,
        reference=load_model(folder, dtype=torch.float32, frozen=True) if config.kl_coef else None,
        tokenizer=tokenizer,
        engine=Engine(policy, tokenizer, num_slots=config.num_slots),
        reward=WeightedRewards([(FunctionReward(reward), 1.0)]),
        optimizer=config.optimizer.build([*policy.named_parameters(), *critic.head_parameters()]),
        prompt_ids=encode_prompts(tasks, tokenizer, config.sampling.max_new_tokens, 128),
    )
    position = Position(
        tasks=TaskBatches(tasks, batch_size=1, seed=3), ptx=ptx_batches, kl_coef=config.kl_coef, skipped=SkippedSteps(5)
    )
    return Setup(config=config, actors=actors, position=position, folder=folder)


def flat(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(after[name] - value).flatten() for name, value in before.items()])


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


class Oracle:
    """transformers' own model over one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def logprobs(self, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


class CriticOracle:
    """transformers' sequence classifier, read before every token."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    def values(self, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        hidden = self.model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
        return self.model.score(hidden).squeeze(-1)


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def check_moved_by(expected: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    size = max(value.abs().max() for value in expected.values())
    assert size > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(before[name] - after[name], value, rtol=1e-3, atol=float(1e-4 * size))


def rows(groups: Sequence[Group]) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    return [
        (group.prompt_ids, completion.token_ids, judge([list(completion.token_ids)])[0])
        for group in groups
        for completion in group.completions
    ]


@pytest.mark.parametrize("network", ["own", "shared"])
def test_with_a_critic_of_zeros_and_lambda_1_it_is_reinforce(tiny_folder: Path, tmp_path: Path, network: Any) -> None:
    """Every weight moves by the gradient of -sum_b R_b log p(completion_b) / N."""
    sampling = Sampling(max_new_tokens=6, temperature=0.8, stop=LETTERS)
    critic = CriticConfig(network=network, clip=math.inf)
    run = setup(tiny_folder, **{**PLAIN, "sampling": sampling, "critic": critic})
    metrics, groups, _ = run.step()
    assert len({len(row[1]) for row in rows(groups)}) > 2
    assert metrics["ratio"] == metrics["ratio_max"] == 1.0
    oracle = Oracle(tiny_folder)
    num_tokens = sum(len(completion) for _, completion, _ in rows(groups))
    loss = -sum(
        reward * oracle.logprobs(prompt, completion, 0.8).sum() for prompt, completion, reward in rows(groups)
    ) / num_tokens  # fmt: skip
    save_model(run.actors.policy, tmp_path / "after")
    run.actors.tokenizer.save(tmp_path / "after")
    after = Oracle(tmp_path / "after").model.state_dict()
    check_moved_by(gradient(oracle.model, loss), oracle.model.state_dict(), after)


def by_hand_gae(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """The sum by definition, in O(T^2): A_t = sum_k (gamma lambda)^k delta_{t+k}."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("whiten", [False, True])
def test_policy_and_critic_move_by_their_gradients_with_everything_on(
    tiny_folder: Path, tmp_path: Path, whiten: bool
) -> None:
    """KL per token to a reference that is elsewhere, GAE, whitening, a critic with opinions: each network by hand."""
    settings = {**PLAIN, "gae_lambda": 0.8, "gamma": 0.95, "kl_coef": 0.3, "whiten_advantages": whiten}
    start = strayed_policy(tiny_folder, tmp_path, 1.1)
    run = setup(tiny_folder, start=start, critic_head=True, **settings)
    save_scalar_model(run.actors.critic.network, tmp_path / "critic")  # type: ignore[arg-type]
    policy_before, critic_before = Oracle(tmp_path / "strayed"), CriticOracle(tmp_path / "critic")
    metrics, groups, batch = run.step()
    reference = Oracle(tiny_folder)
    everything: list[tuple[Tensor, Tensor, list[float], list[float]]] = []
    kl_sums, penalised, squared = [], [], []
    for prompt, completion, reward in rows(groups):
        logprobs = policy_before.logprobs(prompt, completion)
        values = critic_before.values(prompt, completion)
        with torch.no_grad():
            kl = (logprobs - reference.logprobs(prompt, completion)).tolist()
        rewards = [-0.3 * k for k in kl]
        rewards[-1] += reward
        advantages = by_hand_gae(rewards, values.tolist(), 0.95, 0.8)
        returns = [a + v for a, v in zip(advantages, values.tolist(), strict=True)]
        everything.append((logprobs, values, advantages, returns))
        kl_sums.append(sum(kl))
        penalised.append(sum(rewards))
        squared += [0.5 * (r - v) ** 2 for r, v in zip(returns, values.tolist(), strict=True)]
    pooled = torch.tensor([a for _, _, advantages, _ in everything for a in advantages])
    assert metrics["advantage_mean"] == pytest.approx(float(pooled.mean()), abs=1e-4)
    assert metrics["advantage_std"] == pytest.approx(float(pooled.std(correction=0)), rel=1e-3)
    assert metrics["kl_sequence"] == pytest.approx(sum(kl_sums) / 12, rel=1e-3)
    assert metrics["reward_penalised"] == pytest.approx(sum(penalised) / 12, rel=1e-3)
    assert metrics["value_loss"] == pytest.approx(sum(squared) / len(squared), rel=1e-3)
    num_tokens = len(pooled)
    mean, deviation = (pooled.mean(), pooled.std()) if whiten else (0.0, 1.0)
    policy_loss = -sum(
        (logprobs * ((torch.tensor(advantages) - mean) / deviation)).sum()
        for logprobs, _, advantages, _ in everything
    ) / num_tokens  # fmt: skip
    critic_loss = sum(
        0.5 * (values - torch.tensor(returns)).square().sum() for _, values, _, returns in everything
    ) / num_tokens  # fmt: skip
    save_model(run.actors.policy, tmp_path / "after")
    save_scalar_model(run.actors.critic.network, tmp_path / "critic_after")  # type: ignore[arg-type]
    check_moved_by(
        gradient(policy_before.model, policy_loss),
        policy_before.model.state_dict(),
        Oracle(tmp_path / "after").model.state_dict(),
    )
    check_moved_by(
        gradient(critic_before.model, critic_loss),  # type: ignore[arg-type]
        critic_before.model.state_dict(),
        CriticOracle(tmp_path / "critic_after").model.state_dict(),
    )
    assert batch.values_BT is not None and batch.returns_BT is not None


def test_a_shared_trunk_moves_by_both_gradients(tiny_folder: Path, tmp_path: Path) -> None:
    """Policy loss + value_coef * half squared error, through one trunk; and the head by its own."""
    critic = CriticConfig(network="shared", value_coef=2.0, clip=math.inf)
    run = setup(tiny_folder, critic_head=True, **{**PLAIN, "critic": critic})
    (head,) = run.critic_weights().values()
    _, groups, _ = run.step()
    oracle = Oracle(tiny_folder)
    head.requires_grad_()
    loss = torch.zeros(())
    for prompt, completion, reward in rows(groups):
        ids = torch.tensor([[*prompt, *completion]])
        values = oracle.model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1] @ head[0]
        advantages = by_hand_gae([0.0] * (len(completion) - 1) + [reward], values.detach().tolist(), 1.0, 1.0)
        loss = loss - (oracle.logprobs(prompt, completion) * torch.tensor(advantages)).sum()
        # With lambda 1 the return is the reward, at every token.
        loss = loss + 2.0 * 0.5 * (values - reward).square().sum()
    loss = loss / sum(len(completion) for _, completion, _ in rows(groups))
    expected = gradient(oracle.model, loss)
    save_model(run.actors.policy, tmp_path / "after")
    check_moved_by(expected, oracle.model.state_dict(), Oracle(tmp_path / "after").model.state_dict())
    assert head.grad is not None
    check_moved_by({"weight": head.grad}, {"weight": head.detach()}, run.critic_weights())


def test_the_score_lands_on_the_stop_token_that_is_not_eos_and_not_on_padding(tiny_folder: Path) -> None:
    """Lambda 0 and a critic of zeros leave an advantage only where a reward is: on the last token that was sampled."""
    stops = tuple(range(3, 200))
    settings = {**PLAIN, "gae_lambda": 0.0, "sampling": Sampling(max_new_tokens=6)}
    run = setup(tiny_folder, stop_token_ids=stops, missing_eos="replace", missing_eos_penalty=5.0, **settings)
    _, groups, batch = run.step()
    assert batch.advantages_BT is not None
    eos = run.actors.tokenizer.eos_id
    completions = [completion for group in groups for completion in group.completions]
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    assert any(completion.token_ids[-1] in stops and completion.token_ids[-1] != eos for completion in stopped)
    assert len({len(completion.token_ids) for completion in completions}) > 2
    for row, completion in enumerate(completions):
        last = len(completion.token_ids) - 1
        reward = judge([list(completion.token_ids)])[0] if completion.finish_reason == "stop" else -5.0
        expected = torch.zeros(batch.advantages_BT.shape[1])
        expected[last] = reward
        torch.testing.assert_close(batch.advantages_BT[row], expected)
        assert bool(batch.response_mask_BT[row, last]) and not batch.response_mask_BT[row, last + 1 :].any()


@pytest.mark.parametrize(
    ("rule", "expected"), [("keep", [1.0, 2.0]), ("subtract", [1.0, 1.5]), ("replace", [1.0, -0.5])]
)
def test_missing_eos(tiny_folder: Path, rule: Any, expected: list[float]) -> None:
    run = setup(tiny_folder, missing_eos=rule, missing_eos_penalty=0.5)
    _, (group, *_), _ = run.step()
    completions = tuple(
        dataclasses.replace(group.completions[0], finish_reason=reason) for reason in ("stop", "length")
    )
    scores = tuple(dataclasses.replace(group.scores[0], reward=reward) for reward in (1.0, 2.0))
    group = dataclasses.replace(group, completions=completions, scores=scores)
    assert sequence_rewards([group], run.config).tolist() == pytest.approx(expected)


def gradients(run: Setup, groups: Sequence[Group], micro_batch_tokens: int = 100_000) -> tuple[Tensor, Tensor]:
    """The gradients of policy and critic on these groups, without an update."""
    batch, counted_B, _ = run.batch(groups)
    counted = [row for row, is_counted in enumerate(counted_B) if is_counted]
    num_tokens = sum(len(batch.completions[row]) for row in counted)
    for micro in batch.select(counted).split(micro_batch_tokens):
        for loss in micro_losses(
            run.actors.policy, run.actors.critic, micro, run.config,
            kl_coef=0.05, num_tokens=num_tokens, trains_policy=True, averages=Averages(),
        ):  # fmt: skip
            loss.backward()
    found = [
        torch.cat([gradient.flatten() for gradient in optimizer.gradients()])
        for optimizer in (run.actors.optimizer, run.actors.critic.optimizer)
        if optimizer is not None
    ]
    for optimizer in (run.actors.optimizer, run.actors.critic.optimizer):
        if optimizer is not None:
            optimizer.zero_grad()
    return found[0], found[-1]


@pytest.mark.parametrize("network", ["own", "shared"])
def test_order_padding_and_cuts_leave_both_gradients_alone(tiny_folder: Path, network: Any) -> None:
    still = dataclasses.replace(SGD, lr=0.0)
    critic = CriticConfig(network=network, clip=0.05)
    run = setup(tiny_folder, critic_head=True, critic=critic, entropy_coef=0.01, optimizer=still)
    _, groups, _ = run.step()
    whole = gradients(run, groups)
    assert all(part.norm() > 1e-3 for part in whole)
    longest = max(len(completion.token_ids) for group in groups for completion in group.completions)
    broken = [
        dataclasses.replace(score, reward=float("nan"), is_valid=False) for score in groups[0].scores
    ]  # a row that does not count, far longer than the others: all of them get padding
    long = dataclasses.replace(
        groups[0].completions[0],
        token_ids=tuple(range(30, 30 + 3 * longest)),
        sampling_logprobs=(0.0,) * (3 * longest),
    )
    padded = [*groups, dataclasses.replace(groups[0], completions=(long,) * 4, scores=tuple(broken))]
    for other in (
        gradients(run, groups[::-1]),
        gradients(run, groups, micro_batch_tokens=1),
        gradients(run, groups, micro_batch_tokens=13),
        gradients(run, padded),
    ):
        for got, expected in zip(other, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=float(1e-5 * expected.abs().max()))


def test_metrics_do_not_see_how_the_rollout_was_cut_or_padded(tiny_folder: Path) -> None:
    results = []
    for micro_batch_tokens in (100_000, 17, 1):
        run = setup(tiny_folder, micro_batch_tokens=micro_batch_tokens, critic_head=True, epochs_per_rollout=2)
        before = run.policy_weights()
        metrics, _, _ = run.step()
        results.append((flat(before, run.policy_weights()), metrics))
    for change, metrics in results[1:]:
        torch.testing.assert_close(change, results[0][0], rtol=1e-3, atol=1e-5)
        for name, value in metrics.items():
            if not name.startswith("time/"):
                assert value == pytest.approx(results[0][1][name], rel=1e-3, abs=1e-4), name


def test_entropy_and_values_are_means_over_real_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    run = setup(tiny_folder, critic_head=True, **PLAIN)
    save_scalar_model(run.actors.critic.network, tmp_path / "critic")  # type: ignore[arg-type]
    metrics, groups, _ = run.step()
    oracle, critic = Oracle(tiny_folder), CriticOracle(tmp_path / "critic")
    entropies, values = [], []
    with torch.no_grad():
        for prompt, completion, _ in rows(groups):
            logits = oracle.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            law = logits.log_softmax(-1)
            entropies += (-(law.exp() * law).sum(-1)).tolist()
            values += critic.values(prompt, completion).tolist()
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert metrics["value_mean"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    lengths = [len(completion) for _, completion, _ in rows(groups)]
    assert len(values) == sum(lengths) < len(lengths) * max(lengths)


@pytest.mark.parametrize("network", ["own", "shared"])
def test_gradients_are_clipped_each_network_by_its_own_norm(tiny_folder: Path, network: Any) -> None:
    clipped = dataclasses.replace(SGD, max_grad_norm=0.05)
    critic = CriticConfig(network=network, clip=math.inf)
    settings = {**PLAIN, "critic": critic, "optimizer": clipped, "whiten_advantages": True}
    run = setup(tiny_folder, critic_head=True, **settings)
    policy, critic_weights = run.policy_weights(), run.critic_weights()
    metrics, _, _ = run.step()
    moved = flat(policy, run.policy_weights()).norm()
    critic_moved = flat(critic_weights, run.critic_weights()).norm()
    assert metrics["grad_norm"] > 0.1
    if network == "own":
        assert metrics["critic_grad_norm"] > 0.1
        assert float(moved) == pytest.approx(0.05, rel=1e-3)
        assert float(critic_moved) == pytest.approx(0.05, rel=1e-3)
    else:
        assert math.hypot(float(moved), float(critic_moved)) == pytest.approx(0.05, rel=1e-3)


def test_clipping_bounds_policy_and_values_within_a_step(tiny_folder: Path) -> None:
    settings = {"critic_head": True, "clip_low": 0.02, "clip_high": 0.02, "critic": CriticConfig(clip=0.02)}
    once, _, _ = setup(tiny_folder, epochs_per_rollout=1, **settings).step()
    assert once["clipped_low"] == once["clipped_high"] == once["value_clipped"] == once["update_kl"] == 0.0
    often, _, _ = setup(tiny_folder, epochs_per_rollout=3, **settings).step()
    assert often["clipped_low"] > 0 and often["clipped_high"] > 0
    assert often["value_clipped"] > 0 and often["update_kl"] > 0
    assert often["updates"] == 3


def test_minibatches_are_updates_with_one_denominator_each(tiny_folder: Path) -> None:
    run = setup(tiny_folder, minibatch_prompts=1, epochs_per_rollout=2)
    assert run.step()[0]["updates"] == 6


def test_the_kl_coefficient_follows_the_target(tiny_folder: Path) -> None:
    """Ziegler's controller: KL far below the target lowers the coefficient by 0.2 * 12 / 60, far above raises it."""
    for target, factor in ((1e6, 1 - 0.2 * 12 / 60), (1e-9, 1 + 0.2 * 12 / 60)):
        run = setup(tiny_folder, kl_coef=0.1, kl_target=target, kl_horizon=60)
        first = run.step(1)[0]
        assert first["kl_coef"] == 0.1
        second = run.step(2)[0]
        if target > 1:
            assert second["kl_coef"] == pytest.approx(0.1 * factor)
        else:
            # No KL at all at the first step: it too is below every target.
            assert second["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 12 / 60))
            assert second["kl_sequence"] > 0
            assert run.position.kl_coef == pytest.approx(second["kl_coef"] * factor)


def strayed_policy(folder: Path, tmp_path: Path, factor: float) -> Path:
    """The model with all its weights scaled: more certain of everything than the reference."""
    strayed = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in strayed.parameters():
            parameter.mul_(factor)
    save_model(strayed, tmp_path / "strayed")
    Tokenizer.load(folder).save(tmp_path / "strayed")
    return tmp_path / "strayed"


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_plus"])
def test_kl_in_the_loss_moves_the_policy_by_its_gradient_and_is_not_in_the_reward(
    tiny_folder: Path, tmp_path: Path, estimator: Any
) -> None:
    """Without any reward nothing else moves it; k3_plus has k2's gradient."""
    start = strayed_policy(tiny_folder, tmp_path, 1.5)
    run = setup(
        tiny_folder,
        start=start,
        reward=lambda completion_ids, **_: [0.0] * len(completion_ids),
        **{**PLAIN, "kl_coef": 0.7, "kl_placement": "loss", "kl_estimator": estimator},
    )
    metrics, groups, _ = run.step()
    assert metrics["reward_penalised"] == 0.0
    policy, reference = Oracle(start), Oracle(tiny_folder)
    loss, num_tokens = torch.zeros(()), 0
    for prompt, completion, _ in rows(groups):
        d = reference.logprobs(prompt, completion).detach() - policy.logprobs(prompt, completion)
        loss = loss + ((d.exp() - 1 - d) if estimator == "k3" else 0.5 * d.square()).sum()
        num_tokens += len(completion)
    expected = gradient(policy.model, 0.7 * loss / num_tokens)
    save_model(run.actors.policy, tmp_path / "after")
    check_moved_by(expected, policy.model.state_dict(), Oracle(tmp_path / "after").model.state_dict())


def test_ptx_adds_the_gradient_of_its_cross_entropy(tiny_folder: Path, tmp_path: Path) -> None:
    """Without any reward the policy moves by coef * gradient of the mean loss per token, and not otherwise."""
    tokenizer = Tokenizer.load(tiny_folder)
    texts = [tokenizer.encode(text) for text in ("the lazy dog sleeps", "quick fox")]
    examples = [
        Example(token_ids=np.array(ids, dtype=np.int32), loss_mask=np.ones(len(ids), dtype=bool), where="t")
        for ids in texts
    ]
    batches = PackedBatches(examples, batch_tokens=1000, seed=0)
    run = setup(
        tiny_folder,
        reward=lambda completion_ids, **_: [0.0] * len(completion_ids),
        ptx_batches=batches,
        ptx=PtxConfig(data="texts", coef=3.0),
        **PLAIN,
    )
    metrics, _, _ = run.step()
    oracle = Oracle(tiny_folder)
    logprobs = torch.cat([oracle.logprobs(ids[:1], ids[1:]) for ids in texts])
    assert metrics["ptx_loss"] == pytest.approx(-float(logprobs.detach().mean()), rel=1e-4)
    save_model(run.actors.policy, tmp_path / "after")
    after = Oracle(tmp_path / "after").model.state_dict()
    check_moved_by(gradient(oracle.model, -3.0 * logprobs.mean()), oracle.model.state_dict(), after)

    still = setup(tiny_folder, reward=lambda completion_ids, **_: [0.0] * len(completion_ids), **PLAIN)
    before = still.policy_weights()
    still.step()
    assert flat(before, still.policy_weights()).abs().max() == 0.0


def test_equal_rewards_are_no_signal(tiny_folder: Path) -> None:
    """0.1 is no binary fraction: what rounding leaves of its mean must not be whitened into a full step of Adam."""
    settings = {**PLAIN, "whiten_advantages": True, "whiten_rewards": True}
    run = setup(
        tiny_folder,
        reward=lambda completion_ids, **_: [0.1] * len(completion_ids),
        group_size=5,
        prompts_per_step=6,
        **{**settings, "sampling": Sampling(max_new_tokens=1), "optimizer": OptimizerConfig(lr=1e-2)},
    )
    before = run.policy_weights()
    run.step()
    assert same(before, run.policy_weights())


def test_a_warm_up_teaches_the_critic_alone(tiny_folder: Path) -> None:
    run = setup(tiny_folder, critic=CriticConfig(warmup_steps=1))
    policy, critic = run.policy_weights(), run.critic_weights()
    metrics, _, _ = run.step(1)
    assert same(policy, run.policy_weights())
    assert not same(critic, run.critic_weights())
    assert metrics["updates"] == metrics["skipped"] == 0
    run.step(2)
    assert not same(policy, run.policy_weights())


def test_an_infra_error_has_no_influence_on_the_others(tiny_folder: Path) -> None:
    run = setup(tiny_folder, critic_head=True)
    _, groups, _ = run.step()
    broken = [dataclasses.replace(score, reward=3e30, is_valid=False) for score in groups[0].scores]
    with_broken = [dataclasses.replace(groups[0], scores=tuple(broken)), *groups[1:]]
    for got, expected in zip(gradients(run, with_broken), gradients(run, groups[1:]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=float(1e-5 * expected.abs().max()))


@pytest.mark.parametrize("network", ["own", "shared"])
def test_a_gradient_that_overflows_is_refused_and_counted(tiny_folder: Path, network: Any) -> None:
    run = setup(
        tiny_folder,
        reward=lambda completion_ids, **_: [1e38 * (i % 2) for i in range(len(completion_ids))],
        **{**PLAIN, "critic": CriticConfig(network=network)},
    )
    policy, critic = run.policy_weights(), run.critic_weights()
    metrics, _, _ = run.step()
    assert metrics["skipped"] == 1
    assert metrics["updates"] == 0
    assert same(policy, run.policy_weights()) and same(critic, run.critic_weights())


def test_the_step_is_the_same_when_repeated_and_another_with_another_seed(tiny_folder: Path) -> None:
    def result(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        run = setup(tiny_folder, seed=seed, minibatch_prompts=1)
        metrics, _, _ = run.step()
        logged = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        return run.policy_weights(), run.critic_weights(), logged

    first, second, other = result(0), result(0), result(1)
    assert same(first[0], second[0]) and same(first[1], second[1])
    assert first[2] == second[2]
    assert not same(first[0], other[0])


def test_values_of_a_low_precision_critic_are_not_rounded_to_it(tiny_folder: Path) -> None:
    """Values near 4 would come in steps of 1/32: the head is float32, and only the hidden states are not."""
    network = add_scalar_head(load_model(tiny_folder, dtype=torch.bfloat16), seed=3)  # type: ignore[arg-type]
    batch = pack_scored([(range(1, 20), [range(20, 40), range(40, 80)], ())])
    batch = dataclasses.replace(batch, loss_mask_T=torch.ones_like(batch.loss_mask_T))
    with torch.no_grad():
        values_R = Critic(network=network).own_values_R(batch)
        hidden_RD = network.backbone.hidden(batch).double()
        torch.testing.assert_close(
            values_R.double(), hidden_RD @ network.score.weight[0].double(), rtol=1e-5, atol=1e-5
        )
    assert not torch.equal(values_R, values_R.bfloat16().float())
