"""One GRPO step against gradients that transformers takes of whole, unpacked sequences, and what every option does.

The optimiser is Adam with an eps so large that its first update is minus the gradient, so that the change of the
weights is the gradient, whatever the step did to get there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strop.data import TaskBatches
from strop.generation import Engine
from strop.models import load_model, save_model
from strop.optim import OptimizerConfig
from strop.rewards.base import WeightedRewards
from strop.rewards.config import RewardConfig
from strop.rewards.function import FunctionReward
from strop.rollouts.averages import Averages
from strop.rollouts.batch import RolloutBatch
from strop.rollouts.groups import Group
from strop.rollouts.logprobs import frozen_logprobs
from strop.rollouts.prompts import Sampling, encode_prompts
from strop.stages.begin import refresh_reference
from strop.stages.grpo import Actors, Config, grpo_step, make_batch, micro_loss, sample_groups
from strop.tokenizer import Tokenizer
from strop.types import Task

SGD = OptimizerConfig(lr=1e6, eps=1e6, beta1=0.0, beta2=0.0, max_grad_norm=float("inf"))
"""g / (|g| + 1e6) * 1e6 = g to seven digits, for every |g| of this model."""
LETTERS = tuple("aeotusnrihlcdm .,")
"""Stop strings that a random model hits often, so that completions have all lengths."""


def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


@dataclass
class Setup:
    config: Config
    actors: Actors
    tasks: TaskBatches
    folder: Path

    def step(self, number: int = 1) -> tuple[dict[str, float], list[Group], RolloutBatch]:
        return grpo_step(self.actors, self.tasks, self.config, number)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.actors.policy.named_parameters()}


def setup(
    folder: Path, *, reward: Callable[..., list[float]] = judge, start: Path | None = None, **changes: Any
) -> Setup:
    """Three prompts of different lengths, four samples each, unless told; the policy starts at `start`."""
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
    tokenizer = Tokenizer.load(folder)
    policy = load_model(start or folder, dtype=torch.float32)
    actors = Actors(
        policy=policy,
        reference=load_model(folder, dtype=torch.float32, frozen=True) if config.kl_coef else None,
        tokenizer=tokenizer,
        engine=Engine(policy, tokenizer, num_slots=config.num_slots),
        reward=WeightedRewards([(FunctionReward(reward), 1.0)]),
        optimizer=config.optimizer.build(policy.named_parameters()),
        prompt_ids=encode_prompts(tasks, tokenizer, config.sampling.max_new_tokens, 128),
    )
    return Setup(config=config, actors=actors, tasks=TaskBatches(tasks, batch_size=1, seed=3), folder=folder)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(after[name] - value).flatten() for name, value in before.items()])


class Oracle:
    """transformers' own model over one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def logprobs(self, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        loss.backward()
        return {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """GRPO's, by the definition, with the sample standard deviation and eps 1e-4."""
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
    return [(reward - mean) / (deviation + 1e-4) for reward in rewards]


def rows_of(groups: Sequence[Group]) -> list[tuple[tuple[int, ...], tuple[int, ...], float, bool]]:
    """(prompt, completion, advantage over the whole group, whether it stopped), straight from the groups."""
    rows = []
    for group in groups:
        rewards = judge([list(completion.token_ids) for completion in group.completions])
        advantages = group_advantages(rewards) if len(set(rewards)) > 1 else [0.0] * len(rewards)
        for completion, advantage in zip(group.completions, advantages, strict=True):
            rows.append((group.prompt_ids, completion.token_ids, advantage, completion.finish_reason == "stop"))
    return rows


def reinforce(
    oracle: Oracle, rows: Sequence[tuple[Any, ...]], aggregation: str, max_tokens: int, temperature: float = 1.0
) -> dict[str, Tensor]:
    """The gradient of -sum_b weight_b A_b sum_t logp / denominator, with the published weights and denominators."""
    num_tokens = sum(len(row[1]) for row in rows)
    loss = torch.zeros(())
    for prompt, completion, advantage, _ in rows:
        total = oracle.logprobs(prompt, completion, temperature).sum()
        loss = (
            loss
            - advantage
            * {
                "token_mean": total / num_tokens,
                "seq_mean_token_mean": total / len(completion) / len(rows),
                "token_sum_norm": total / (len(rows) * max_tokens),
                "seq_mean_token_sum": total / len(rows),
            }[aggregation]
        )
    return oracle.gradient(loss)


def check_update_is(expected: Mapping[str, Tensor], setup_: Setup, tmp_path: Path) -> None:
    """The saved policy, opened by transformers, differs from the start by minus the expected gradient."""
    save_model(setup_.actors.policy, tmp_path / "after")
    setup_.actors.tokenizer.save(tmp_path / "after")
    before, after = Oracle(setup_.folder).model.state_dict(), Oracle(tmp_path / "after").model.state_dict()
    size = max(value.abs().max() for value in expected.values())
    assert size > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-3, atol=float(1e-4 * size))


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "token_sum_norm", "seq_mean_token_sum"])
def test_the_update_is_reinforce_by_hand(tiny_folder: Path, tmp_path: Path, aggregation: str) -> None:
    run = setup(
        tiny_folder, aggregation=aggregation, sampling=Sampling(max_new_tokens=6, temperature=0.8, stop=LETTERS)
    )
    metrics, groups, _ = run.step()
    rows = rows_of(groups)
    assert len({len(row[1]) for row in rows}) > 2, "completions of one length cannot tell the aggregations apart"
    assert metrics["engine_gap_max"] < 1e-5
    assert metrics["ratio"] == metrics["ratio_max"] == 1.0
    check_update_is(reinforce(Oracle(tiny_folder), rows, aggregation, 6, 0.8), run, tmp_path)


def test_every_loss_has_the_same_first_update_and_another_second_one(tiny_folder: Path) -> None:
    """At ratio 1 all surrogates have the policy gradient; they differ in what they do once the policy has moved."""
    losses = ["clip", "sequence_clip", "cispo", "sapo", "reinforce"]
    first = {}
    for loss in losses:
        run = setup(tiny_folder, loss=loss)
        before = run.weights()
        run.step()
        first[loss] = changes(before, run.weights())
    for loss in losses:
        torch.testing.assert_close(first[loss], first["reinforce"], rtol=1e-3, atol=1e-6)
    second = {}
    for loss in losses[:-1]:
        run = setup(tiny_folder, loss=loss, epochs_per_rollout=2, clip_low=0.02, clip_high=0.02)
        metrics, _, _ = run.step()
        assert metrics["updates"] == 2
        assert metrics["ratio_max"] > 1.02
        second[loss] = changes(before, run.weights()) - first[loss]
    for loss in losses[1:-1]:
        assert (second[loss] - second["clip"]).norm() > 0.01 * second["clip"].norm(), loss


@pytest.mark.parametrize("loss", ["clip", "sequence_clip", "cispo"])
def test_a_huge_learning_rate_is_clipped_and_one_update_never_is(tiny_folder: Path, loss: str) -> None:
    metrics, _, _ = setup(tiny_folder, loss=loss).step()
    assert metrics["clipped_low"] == metrics["clipped_high"] == 0.0
    metrics, _, _ = setup(
        tiny_folder, loss=loss, epochs_per_rollout=3, optimizer=dataclasses.replace(SGD, lr=3e7)
    ).step()
    assert metrics["clipped_low"] > 0
    assert metrics["clipped_high"] > 0
    assert metrics["clipped_low"] + metrics["clipped_high"] <= 1


def test_the_sequence_ratio_is_what_sequence_clip_logs(tiny_folder: Path) -> None:
    """The geometric mean over a sequence lies nearer to 1 than its largest token's ratio."""
    large = dataclasses.replace(SGD, lr=1e7)
    of_tokens, _, _ = setup(tiny_folder, loss="sapo", epochs_per_rollout=2, optimizer=large).step()
    of_sequences, _, _ = setup(tiny_folder, loss="sequence_clip", epochs_per_rollout=2, optimizer=large).step()
    assert 1 < of_sequences["ratio_max"] < of_tokens["ratio_max"]
    assert "clipped_low" not in of_tokens, "SAPO has no clip to count"


def test_dual_clip_bounds_what_became_likely_by_accident(tiny_folder: Path) -> None:
    """Every token e^2 times likelier than it was: bad ones weigh 3 instead of e^2, good ones are clipped at 1.2."""
    run = setup(tiny_folder, dual_clip=3.0)
    groups, _, _ = sample_groups(run.actors, run.tasks, run.config, 1)
    batch, _ = make_batch(run.actors, groups, run.config)
    assert batch.advantages_BT is not None
    logprobs_BT = frozen_logprobs(run.actors.policy, batch, temperature=1.0, max_tokens=1000)
    batch = batch.replace(old_logprobs_BT=logprobs_BT - 2.0)
    averages = Averages()
    loss = micro_loss(run.actors.policy, batch, run.config, 1, averages)
    advantages = batch.advantages_BT[batch.response_mask_BT]
    bad = advantages < 0
    assert averages.result()["clipped_dual"] == pytest.approx(float(bad.float().mean()))
    assert averages.result()["clipped_high"] == pytest.approx(float((advantages > 0).float().mean()))
    assert loss.item() == pytest.approx(float((-advantages * torch.where(bad, 3.0, 1.2)).sum()), rel=1e-4)
    assert "clipped_dual" not in setup(tiny_folder).step()[0]


def test_micro_batches_do_not_change_the_step(tiny_folder: Path) -> None:
    results = []
    for micro_batch_tokens in (100_000, 17, 1):
        run = setup(tiny_folder, micro_batch_tokens=micro_batch_tokens, epochs_per_rollout=2, kl_coef=0.1)
        before = run.weights()
        metrics, _, _ = run.step()
        results.append((changes(before, run.weights()), metrics))
    for change, metrics in results[1:]:
        torch.testing.assert_close(change, results[0][0], rtol=1e-3, atol=1e-5)
        for name, value in metrics.items():
            if not name.startswith("time/"):
                assert value == pytest.approx(results[0][1][name], rel=1e-3, abs=1e-5), name


def test_minibatches_are_updates_of_whole_groups(tiny_folder: Path) -> None:
    whole = setup(tiny_folder)
    before = whole.weights()
    assert whole.step()[0]["updates"] == 1
    parts = setup(tiny_folder, minibatch_prompts=1)
    metrics, _, batch = parts.step()
    assert metrics["updates"] == 3
    assert metrics["ratio"] != 1.0
    assert batch.old_logprobs_BT is not None
    assert not torch.equal(changes(before, whole.weights()), changes(before, parts.weights()))


def test_flat_groups_change_nothing_bit_for_bit(tiny_folder: Path) -> None:
    """0.1 is no binary fraction: a mean of it is rounded, and what is left must not become an advantage."""
    for advantage, scale in (("group", "std"), ("leave_one_out", "none"), ("batch", "std")):
        run = setup(
            tiny_folder,
            reward=lambda completion_ids, **_: [0.1] * len(completion_ids),
            advantage=advantage,
            advantage_scale=scale,
            optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1),
            group_size=5,
            prompts_per_step=6,
        )
        before = run.weights()
        metrics, _, _ = run.step()
        assert same(before, run.weights()), advantage
        assert metrics["groups_flat"] == metrics["groups"] == 6
        assert metrics["updates"] == metrics["skipped"] == 0
        assert metrics["reward"] == pytest.approx(0.1)


def test_an_infra_error_has_no_influence_on_the_others(tiny_folder: Path, tmp_path: Path) -> None:
    def breaks_on_the_second(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float("nan") if i == 1 else score for i, score in enumerate(judge(completion_ids))]

    run = setup(tiny_folder, reward=breaks_on_the_second)
    metrics, groups, batch = run.step()
    assert metrics["invalid_samples"] == 1
    first = [list(completion.token_ids) for completion in groups[0].completions]
    valid = [0, 2, 3]
    rows = rows_of(groups)[4:]
    scores = judge([first[i] for i in valid])
    assert len(set(scores)) > 1
    for i, advantage in zip(valid, group_advantages(scores), strict=True):
        rows.append((groups[0].prompt_ids, tuple(first[i]), advantage, True))
    assert batch.advantages_BT is not None and float(batch.advantages_BT[1, 0]) == 0.0
    check_update_is(reinforce(Oracle(tiny_folder), rows, "token_mean", 6), run, tmp_path)


def test_mask_truncated_takes_truncated_rows_out_of_the_denominator(tiny_folder: Path, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=3, stop=LETTERS)
    run = setup(tiny_folder, mask_truncated=True, sampling=sampling)
    metrics, groups, _ = run.step()
    rows = rows_of(groups)  # advantages over the whole group, truncated or not
    stopped = [row for row in rows if row[3]]
    assert 0 < len(stopped) < len(rows)
    assert metrics["truncated"] == pytest.approx(1 - len(stopped) / len(rows))
    check_update_is(reinforce(Oracle(tiny_folder), stopped, "token_mean", 3), run, tmp_path)


def test_dynamic_sampling_replaces_flat_groups_and_counts_them(tiny_folder: Path) -> None:
    def only_odd_tasks(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        return [0.5 if n % 2 == 0 else i / 100 for i, n in enumerate(number)]

    run = setup(tiny_folder, reward=only_odd_tasks, dynamic_sampling=True, max_sampling_rounds=20)
    metrics, groups, _ = run.step()
    assert metrics["groups"] == len(groups) == 3
    assert not any(group.is_flat for group in groups)
    assert all(int(group.task.columns["number"]) % 2 == 1 for group in groups)
    assert metrics["groups_flat"] > 0
    assert metrics["groups_sampled"] == metrics["groups_flat"] + 3
    assert metrics["num_tokens"] > sum(len(c.token_ids) for group in groups for c in group.completions)
    # What the policy earned is over everything that it sampled, not over the groups that were kept.
    kept = [score.reward for group in groups for score in group.scores]
    flat = [0.5] * int(4 * metrics["groups_flat"])
    assert metrics["reward"] == pytest.approx(sum(kept + flat) / len(kept + flat), rel=1e-5)

    hopeless = setup(
        tiny_folder,
        reward=lambda completion_ids, **_: [0.0] * len(completion_ids),
        dynamic_sampling=True,
        max_sampling_rounds=4,
    )
    before = hopeless.weights()
    metrics, groups, _ = hopeless.step()
    assert metrics["groups_sampled"] == metrics["groups_flat"] == 12
    assert len(groups) == 3
    assert same(before, hopeless.weights())


def test_kl_is_zero_at_the_reference_grows_and_a_refresh_makes_it_zero_again(tiny_folder: Path) -> None:
    run = setup(tiny_folder, kl_coef=1e-9, reference_refresh_steps=1)
    assert run.step(1)[0]["kl"] < 1e-10
    assert run.step(2)[0]["kl"] > 1e-6
    assert run.actors.reference is not None
    refresh_reference(run.actors.reference, run.actors.policy)
    assert run.step(3)[0]["kl"] < 1e-10


@pytest.mark.parametrize(("estimator", "coef"), [("k2", 1.0), ("k3", 1.0), ("k3_plus", 1.0), ("k3", 1e-9)])
def test_kl_in_the_loss_pulls_back_to_the_reference(tiny_folder: Path, estimator: Any, coef: float) -> None:
    """A reward drives the policy away, then there is none any more: only the KL is left to learn from, if its
    coefficient is not next to nothing."""
    is_paid = True

    def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-float(len(ids)) if is_paid else 0.0 for ids in completion_ids]

    run = setup(
        tiny_folder,
        reward=short,
        kl_coef=1e-9,
        kl_estimator=estimator,
        prompts_per_step=6,
        group_size=8,
        optimizer=OptimizerConfig(lr=3e-3),
    )
    away = [run.step(number)[0]["kl"] for number in range(1, 21)]
    is_paid = False
    run.config = dataclasses.replace(run.config, kl_coef=coef, optimizer=OptimizerConfig(lr=1e-3, eps=1e-6))
    back = [run.step(number)[0]["kl"] for number in range(21, 41)]
    assert away[0] < 1e-10 and back[0] > 0.1
    assert (sum(back[-3:]) < 0.75 * sum(back[:3])) == (coef == 1.0)


def test_kl_in_the_reward_is_summed_over_the_completion(tiny_folder: Path, tmp_path: Path) -> None:
    strayed = load_model(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in strayed.parameters():
            parameter.mul_(1.1)
    save_model(strayed, tmp_path / "strayed")
    Tokenizer.load(tiny_folder).save(tmp_path / "strayed")
    run = setup(
        tiny_folder,
        start=tmp_path / "strayed",
        kl_coef=0.3,
        kl_placement="reward",
        kl_estimator="k1",
        advantage_scale="none",
    )
    _, groups, batch = run.step()
    policy, reference = Oracle(tmp_path / "strayed"), Oracle(tiny_folder)
    expected = []
    with torch.no_grad():
        for group in groups:
            rewards = judge([list(completion.token_ids) for completion in group.completions])
            for i, completion in enumerate(group.completions):
                pair = (group.prompt_ids, completion.token_ids)
                rewards[i] -= 0.3 * float((policy.logprobs(*pair) - reference.logprobs(*pair)).sum())
            expected += [reward - sum(rewards) / len(rewards) for reward in rewards]
    assert batch.advantages_BT is not None
    torch.testing.assert_close(batch.advantages_BT[:, 0], torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_overlong_buffer_lowers_the_reward_of_long_completions(tiny_folder: Path) -> None:
    def flat(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0] * len(completion_ids)

    run = setup(tiny_folder, reward=flat, overlong_buffer=4, overlong_weight=0.5, advantage_scale="none")
    _, groups, batch = run.step()
    assert batch.advantages_BT is not None
    expected = []
    for group in groups:
        lengths = [len(completion.token_ids) for completion in group.completions]
        rewards = [1.0 - 0.5 * max(0, length - 2) / 4 for length in lengths]
        expected += [reward - sum(rewards) / len(rewards) for reward in rewards]
    assert max(expected) > 0.1
    torch.testing.assert_close(batch.advantages_BT[:, 0], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_an_entropy_bonus_raises_the_entropy(tiny_folder: Path) -> None:
    run = setup(
        tiny_folder,
        reward=lambda completion_ids, **_: [0.0] * len(completion_ids),
        entropy_coef=0.1,
        prompts_per_step=6,
        optimizer=OptimizerConfig(lr=3e-3),
    )
    values = [run.step(number)[0]["entropy"] for number in range(1, 13)]
    assert sum(values[-3:]) > sum(values[:3]) + 0.1


@pytest.mark.parametrize(
    ("correction", "factor"),
    [("token_truncate", 2.0), ("sequence_truncate", 2.0), ("token_mask", 0.0), ("sequence_mask", 0.0)],
)
def test_importance_correction_bounds_tokens_that_the_trainer_would_not_sample(
    tiny_folder: Path, correction: Any, factor: float
) -> None:
    """An honest engine gets weights of 1; one that reports e^-3 too little probability gets the cap, or is masked."""
    plain = setup(tiny_folder)
    before = plain.weights()
    plain.step()
    corrected = setup(tiny_folder, importance_correction=correction)
    metrics, _, _ = corrected.step()
    assert metrics["importance_weight"] == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(
        changes(before, corrected.weights()), changes(before, plain.weights()), rtol=1e-3, atol=1e-6
    )

    fresh = setup(tiny_folder, importance_correction=correction)
    groups, _, _ = sample_groups(fresh.actors, fresh.tasks, fresh.config, 1)
    batch, _ = make_batch(fresh.actors, groups, fresh.config)
    lying = batch.replace(sampling_logprobs_BT=batch.sampling_logprobs_BT - 3.0)
    averages = Averages()
    loss = micro_loss(fresh.actors.policy, lying, fresh.config, 1, averages)
    honest = micro_loss(
        fresh.actors.policy, batch, dataclasses.replace(fresh.config, importance_correction="none"), 1, Averages()
    )
    assert averages.result()["importance_weight"] == pytest.approx(factor)
    assert abs(honest.item()) > 1e-3
    assert loss.item() == pytest.approx(factor * honest.item(), rel=1e-4)


def test_a_gradient_that_overflows_is_refused_and_counted(tiny_folder: Path) -> None:
    run = setup(
        tiny_folder,
        reward=lambda completion_ids, **_: [1e38 * (i % 2) for i in range(len(completion_ids))],
        advantage_scale="none",
    )
    before = run.weights()
    metrics, _, _ = run.step()
    assert metrics["skipped"] == 1
    assert metrics["updates"] == 0
    assert same(before, run.weights())


def test_a_task_is_answered_anew_in_every_step_and_round(tiny_folder: Path) -> None:
    """The policy stands still and all groups are flat, so that only the seed can make a difference."""
    run = setup(
        tiny_folder,
        reward=lambda completion_ids, **_: [0.0] * len(completion_ids),
        prompts_per_step=6,
        dynamic_sampling=True,
        max_sampling_rounds=2,
    )
    answers: dict[str, list[tuple[Any, ...]]] = {}
    for step in (1, 2):
        for group in sample_groups(run.actors, run.tasks, run.config, step)[1]:
            answers.setdefault(group.task.id, []).append(tuple(c.token_ids for c in group.completions))
    assert len(answers) == 6
    for groups in answers.values():
        assert len(groups) == 4
        assert len({completion for group in groups for completion in group}) > 12
        assert len(set(groups)) == 4


def test_the_step_is_the_same_when_repeated_and_another_with_another_seed(tiny_folder: Path) -> None:
    def result(seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        run = setup(tiny_folder, seed=seed, minibatch_prompts=1)
        metrics, _, _ = run.step()
        return run.weights(), {name: value for name, value in metrics.items() if not name.startswith("time/")}

    first, second, other = result(0), result(0), result(1)
    assert same(first[0], second[0])
    assert first[1] == second[1]
    assert not same(first[0], other[0])
