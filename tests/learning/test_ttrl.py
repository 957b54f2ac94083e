"""A majority vote teaches a policy whose votes are mostly right, through GRPO (ttrl) and PPO; another prompt's vote
does not; and a policy that learns to give one answer to everything is stopped. No label is given to any of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from strop.models import LoraConfig
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rewards.vote import VoteReward, count_votes
from strop.rollouts.prompts import Sampling
from strop.runs import RunFolder, load_training_state, read_lines
from strop.stages import ppo, sft, ttrl
from strop.stages.held_out import Evaluation
from strop.stages.ppo_config import CriticConfig
from strop.stages.ttrl_config import Config, HeldOut
from strop.types import Completion, Task, Verdict


class OtherVote(VoteReward):
    """The control: the majority answer of the next prompt of the batch counts as right."""

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        keys: dict[str, list[str | None]] = {}
        for task, completion in zip(tasks, completions, strict=True):
            keys.setdefault(task.id, []).append(self.answer_key(completion))
        names = list(keys)
        label = {
            name: count_votes(keys[other]).winner for name, other in zip(names, names[1:] + names[:1], strict=True)
        }
        own = [self.answer_key(completion) for completion in completions]
        return [Verdict(score=float(key == label[task.id])) for key, task in zip(own, tasks, strict=True)]


class OneAnswer(VoteReward):
    """What a collapse looks like: "3" is always right."""

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(score=float(self.answer_key(completion) == "3")) for completion in completions]


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is right about the first or last of three digits in some 40 % of its answers: the run "taught"."""
    root = tmp_path_factory.mktemp("ttrl")
    draw = random.Random(0)
    rows = [
        {"prompt": f"{which} {number:03d} =", "answer": f"{number:03d}"[place]}
        for which, place in (("first", 0), ("last", 2))
        for number in range(1000)
    ]
    draw.shuffle(rows)
    training, held_out = rows[:1600], rows[1600:1720]
    taught = [
        {"prompt": row["prompt"], "completion": row["answer"] if draw.random() < 0.4 else str(draw.randrange(10))}
        for row in training
    ]
    sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=write_lines(root / "sft.jsonl", taught),
            num_steps=500,
            batch_tokens=1024,
            micro_batch_tokens=1024,
            max_length=64,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
            save_every=1000,
            dtype="float32",
        ),
        name="taught",
        runs_dir=root,
        resume=False,
    )
    write_lines(root / "tasks.jsonl", [{"prompt": row["prompt"]} for row in training])
    write_lines(root / "held_out.jsonl", held_out)
    write_lines(root / "labelled.jsonl", training)
    return root


def config(folder: Path, held_out: HeldOut) -> Config:
    return Config(
        init_from="taught",
        tasks=str(folder / "tasks.jsonl"),
        num_steps=50,
        num_votes=16,
        group_size=8,
        prompts_per_step=16,
        sampling=Sampling(max_new_tokens=4),
        optimizer=OptimizerConfig(lr=5e-3),
        lora=LoraConfig(rank=8, alpha=16),
        held_out=held_out,
        save_every=1000,
        dtype="float32",
    )


def watched(folder: Path, **settings: float) -> HeldOut:
    return HeldOut(tasks=str(folder / "held_out.jsonl"), num_prompts=120, num_samples=8, **settings)  # type: ignore[arg-type]


def test_a_vote_teaches_and_the_vote_of_another_prompt_does_not(folder: Path) -> None:
    success: dict[str, list[float]] = {}
    votes: dict[str, float] = {}
    for name, reward in (("own", None), ("other", OtherVote())):
        never = watched(folder, every=25, max_drop=1.0, min_answers=0.0)
        run = ttrl.train(config(folder, never), name=name, runs_dir=folder, resume=False, reward=reward)
        lines = [line for line in read_lines(run / "metrics.jsonl") if "eval/pass@1" in line]
        success[name] = [line["eval/pass@1"] for line in lines]
        votes[name] = lines[0]["eval/maj@8"]
    print(success, votes)
    before, after = success["own"][0], success["own"][-1]
    assert 0.25 < before < 0.6 and before < votes["own"]
    assert after > before + 0.25 and after > votes["own"] - 0.05
    assert success["other"][0] == before and success["other"][-1] < before + 0.1


def test_the_same_vote_teaches_through_ppo(folder: Path) -> None:
    run = ppo.train(
        ppo.Config(
            init_from="taught",
            tasks=str(folder / "labelled.jsonl"),
            # The first reward is the held-out figure; with weight 0 it has no part in what is learned.
            rewards=(RewardConfig(name="math", weight=0.0), RewardConfig(name="vote")),
            num_steps=40,
            prompts_per_step=16,
            group_size=16,
            kl_coef=0.0,
            gae_lambda=1.0,
            epochs_per_rollout=2,
            sampling=Sampling(max_new_tokens=4),
            critic=CriticConfig(lr=5e-3),
            optimizer=OptimizerConfig(lr=3e-3),
            eval=Evaluation(tasks=str(folder / "held_out.jsonl"), every=1000, num_samples=8),
            save_every=1000,
            dtype="float32",
        ),
        name="ppo",
        runs_dir=folder,
        resume=False,
    )
    lines = [line for line in read_lines(run / "metrics.jsonl") if "eval/pass@1" in line]
    before, after = lines[0]["eval/pass@1"], lines[-1]["eval/pass@1"]
    print(before, after)
    assert before < 0.6 and after > before + 0.25


def test_one_answer_to_everything_is_stopped_and_undone(folder: Path) -> None:
    run = ttrl.train(
        config(folder, watched(folder, every=5)), name="collapse", runs_dir=folder, resume=False, reward=OneAnswer()
    )
    opened = RunFolder.open(folder, "collapse")
    newest = opened.latest_checkpoint()
    assert newest is not None and newest.step is not None and newest.step < 50
    watch = load_training_state(newest)[1]["watch"]
    print(newest.step, watch["reason"])
    *_, collapsed, result = [line for line in read_lines(run / "metrics.jsonl") if "eval/pass@1" in line]
    assert collapsed["eval/distinct_answers"] < 0.6 * watch["base_distinct"]
    assert collapsed["eval/pass@1"] < result["eval/pass@1"] - 0.1
