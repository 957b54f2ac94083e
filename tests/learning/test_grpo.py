"""GRPO raises the success on held-out tasks of a policy that sometimes solves them, and not with shuffled answers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import grpo, sft
from strop.stages.grpo_config import Evaluation

REWARD = """
def exact(completions, answer, **_):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]
"""


def write_lines(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_from_right_answers_and_not_from_shuffled_ones(tiny_folder: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = [
        {"prompt": f"{which} {number:03d} =", "answer": f"{number:03d}"[place]}
        for which, place in (("first", 0), ("last", 2))
        for number in range(1000)
    ]
    draw.shuffle(rows)
    training, held_out = rows[:1600], rows[1600:1700]
    answers = [row["answer"] for row in training]
    draw.shuffle(answers)
    shuffled = [{**row, "answer": answer} for row, answer in zip(training, answers, strict=True)]
    # A third of the answers that it is taught are right, the others random: so it learns to be right about that often.
    taught = [
        {"prompt": row["prompt"], "completion": row["answer"] if draw.random() < 0.33 else str(draw.randrange(10))}
        for row in training
    ]
    (tmp_path / "reward.py").write_text(REWARD)
    held_out_file = write_lines(tmp_path / "held_out.jsonl", held_out)
    sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=write_lines(tmp_path / "sft.jsonl", taught),
            num_steps=500,
            batch_tokens=1024,
            micro_batch_tokens=1024,
            max_length=64,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
            save_every=1000,
            dtype="float32",
            seed=seed,
        ),
        name="taught",
        runs_dir=tmp_path,
        resume=False,
    )
    success: dict[str, tuple[float, float]] = {}
    for name, tasks in (("right", training), ("shuffled", shuffled)):
        run = grpo.train(
            grpo.Config(
                init_from="taught",
                tasks=write_lines(tmp_path / f"{name}.jsonl", tasks),
                rewards=(RewardConfig(name=f"{tmp_path / 'reward.py'}:exact"),),
                num_steps=50,
                prompts_per_step=16,
                group_size=8,
                sampling=Sampling(max_new_tokens=4),
                optimizer=OptimizerConfig(lr=3e-3),
                eval=Evaluation(tasks=held_out_file, every=1000, num_samples=4),
                save_every=1000,
                dtype="float32",
                seed=seed,
            ),
            name=name,
            runs_dir=tmp_path,
            resume=False,
        )
        lines = list(read_lines(run / "metrics.jsonl"))
        success[name] = lines[0]["eval/pass@1"], lines[-1]["eval/pass@1"]
    before, after = success["right"]
    assert 0.2 < before < 0.5
    assert after > 0.8
    assert success["shuffled"][0] == before
    assert success["shuffled"][1] <= before + 0.1
