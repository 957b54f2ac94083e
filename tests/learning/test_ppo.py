"""PPO raises the success on held-out tasks, with a verifier as the reward and with a reward model; shuffled rewards do
not. The same policy, the same tasks, the same settings: only the reward differs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.models import load_model
from strop.models.heads import add_scalar_head, pack_scored, save_scalar_model
from strop.models.reward_scale import RewardScale
from strop.objectives.reward_model import bradley_terry_loss
from strop.optim import OptimizerConfig, optimizer_step
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import ppo, sft
from strop.stages.held_out import Evaluation
from strop.stages.ppo_config import Config, CriticConfig
from strop.tokenizer import Tokenizer
from strop.types import Tree

REWARD = """
def exact(completions, answer, **_):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]

def is_first(prompts, **_):
    return [float(prompt.startswith("first")) for prompt in prompts]

def coin(prompts, coin, **_):
    return [float(side) for side in coin]

def truth(completions, truth, **_):
    return [float(text.strip() == right) for text, right in zip(completions, truth)]
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A policy that is right about a third of the time, and what it may learn from."""

    folder: Path
    start: Path
    rows: list[dict[str, str]]
    held_out: str


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def task(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("ppo")
    draw = random.Random(0)
    rows = [
        {"prompt": f"{which} {number:03d} =", "answer": f"{number:03d}"[place]}
        for which, place in (("first", 0), ("last", 2))
        for number in range(1000)
    ]
    rows = [{**row, "truth": row["answer"]} for row in rows]
    draw.shuffle(rows)
    taught = [
        {"prompt": row["prompt"], "completion": row["answer"] if draw.random() < 0.33 else str(draw.randrange(10))}
        for row in rows[:1600]
    ]
    (folder / "reward.py").write_text(REWARD)
    run = sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=write_lines(folder / "sft.jsonl", taught),
            num_steps=500,
            batch_tokens=1024,
            micro_batch_tokens=1024,
            max_length=64,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
            save_every=1000,
            dtype="float32",
        ),
        name="taught",
        runs_dir=folder,
        resume=False,
    )
    held_out = write_lines(folder / "held_out.jsonl", rows[1600:1700])
    return Task(folder=folder, start=run / "checkpoints/step-000500", rows=rows[:1600], held_out=held_out)


def shuffled(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    answers = [row["answer"] for row in rows]
    random.Random(1).shuffle(answers)
    return [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]


def learn(
    task: Task, name: str, rows: Sequence[dict[str, str]], rewards: tuple[RewardConfig, ...], **changes: Any
) -> list[Any]:
    """The lines of metrics.jsonl; eval/pass@1 is the true success, whatever the reward is."""
    truth = RewardConfig(name=f"{task.folder / 'reward.py'}:truth", weight=0.0)
    settings: dict[str, Any] = {
        "init_from": "taught",
        "tasks": write_lines(task.folder / f"{name}.jsonl", rows),
        "rewards": (truth, *rewards),
        "num_steps": 40,
        "prompts_per_step": 128,
        "epochs_per_rollout": 2,
        "sampling": Sampling(max_new_tokens=4),
        "critic": CriticConfig(lr=3e-3),
        "optimizer": OptimizerConfig(lr=2e-3),
        "eval": Evaluation(tasks=task.held_out, every=1000, num_samples=4),
        "save_every": 1000,
        "dtype": "float32",
    }
    run = ppo.train(Config(**(settings | changes)), name=name, runs_dir=task.folder, resume=False)
    return list(read_lines(run / "metrics.jsonl"))


def check_success(right: list[Any], control: list[Any]) -> None:
    before = right[0]["eval/pass@1"]
    assert control[0]["eval/pass@1"] == before
    assert 0.2 < before < 0.5
    assert right[-1]["eval/pass@1"] > 0.8
    assert control[-1]["eval/pass@1"] < before + 0.1


def test_learns_from_a_verifier_and_not_from_shuffled_answers(task: Task) -> None:
    exact = RewardConfig(name=f"{task.folder / 'reward.py'}:exact")
    right = learn(task, "right", task.rows, (exact,))
    check_success(right, learn(task, "shuffled", shuffled(task.rows), (exact,)))


def test_learns_with_a_critic_on_the_policys_own_trunk(task: Task) -> None:
    exact = RewardConfig(name=f"{task.folder / 'reward.py'}:exact")
    lines = learn(task, "shared", task.rows, (exact,), critic=CriticConfig(network="shared"))
    assert lines[-1]["eval/pass@1"] > 0.8


def test_the_critic_learns_what_decides_the_reward_and_no_coin(task: Task) -> None:
    """The policy stands still; which of two kinds of prompts it is decides the reward, or a coin does."""
    explained = {}
    for which in ("is_first", "coin"):
        rows = [{**row, "coin": str(random.Random(row["prompt"]).randrange(2))} for row in task.rows]
        reward = RewardConfig(name=f"{task.folder / 'reward.py'}:{which}")
        optimizer = OptimizerConfig(lr=0.0)
        lines = learn(task, which, rows, (reward,), optimizer=optimizer, num_steps=12, kl_coef=0.0)
        values = [line["explained_variance"] for line in lines if line["step"]]
        assert values[0] == 0.0, "a head of zeros explains nothing"
        explained[which] = sum(values[-3:]) / 3
    assert explained["is_first"] > 0.8
    assert explained["coin"] < 0.2


def reward_model(task: Task, name: str, rows: Sequence[dict[str, str]], *, num_steps: int = 300) -> str:
    """A reward model that learned from pairs, the row's answer preferred to another digit or to junk; its folder.

    Its zero and unit are those of its scores on the pairs, as the reward_model stage stores them.
    """
    tokenizer = Tokenizer.load(task.start)
    policy = load_model(task.start, dtype=torch.float32)
    model = add_scalar_head(policy, seed=0)  # type: ignore[arg-type]
    optimizer = OptimizerConfig(lr=2e-3).build(model.named_parameters())
    draw = random.Random(2)
    scores = torch.zeros(0)
    for step in range(num_steps):
        trees: list[Tree] = []
        for row in draw.sample(rows, 32):
            other = tokenizer.encode(draw.choice([digit for digit in "0123456789" if digit != row["answer"]]))
            if draw.random() < 0.3:  # what no person would prefer, so that it pays in no reward model either
                other = [draw.randrange(1, 300) for _ in range(draw.randint(1, 3))]
            pair = [[*ids, *tokenizer.stop_token_ids[:1]] for ids in (tokenizer.encode(row["answer"]), other)]
            trees.append((tokenizer.encode_prompt(row["prompt"]), pair, ()))
        scores_P2 = model.scores_R(pack_scored(trees)).view(-1, 2)
        bradley_terry_loss(scores_P2[:, 0], scores_P2[:, 1], centring_coef=0.01).mean().backward()
        optimizer_step(optimizer, lr=2e-3 * (1 - step / num_steps), max_grad_norm=1.0)
        scores = scores_P2.detach()
    folder = task.folder / name
    save_scalar_model(model, folder, reward_scale=RewardScale.of(scores))
    tokenizer.save(folder)
    return str(folder)


def test_learns_from_a_reward_model_and_not_from_one_that_read_shuffled_preferences(task: Task) -> None:
    runs = []
    for name, rows in (("rankings", task.rows), ("shuffled_rankings", shuffled(task.rows))):
        model = RewardConfig(name="model", options={"model": reward_model(task, f"{name}_model", rows)})
        runs.append(learn(task, name, task.rows, (model,)))
    check_success(*runs)
