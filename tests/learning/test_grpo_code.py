"""GRPO learns to write code that passes its tests, run in the sandbox; with shuffled tests it does not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import grpo, sft
from strop.stages.grpo_config import Evaluation

pytestmark = pytest.mark.usefixtures("sandbox_works")

OPERATORS = {"add": "+", "less": "-", "times": "*", "or": "|", "and": "&", "xor": "^"}
OUTPUTS = {"add": 8, "less": 2, "times": 15, "or": 7, "and": 1, "xor": 6}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task(word: str, number: int) -> dict[str, Any]:
    """A program to complete: `print(5` and then the operator that the word before it names."""
    return {"prompt": f"# {word} {number:02d}\nprint(5", "cases": [{"input": "", "output": f"{OUTPUTS[word]}\n"}]}


def test_learns_from_right_tests_and_not_from_shuffled_ones(tiny_folder: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [(word, task(word, number)) for word in OPERATORS for number in range(60)]
    draw.shuffle(rows)
    training, held_out = [row for _, row in rows[:320]], [row for _, row in rows[320:]]
    cases = [row["cases"] for row in training]
    draw.shuffle(cases)
    shuffled = [{**row, "cases": other} for row, other in zip(training, cases, strict=True)]
    # A third of what it is taught is right, the rest drawn at random: so it begins to be right about that often.
    signs = list(OPERATORS.values())
    taught = [
        {"prompt": row["prompt"], "completion": f"{OPERATORS[word] if draw.random() < 0.3 else draw.choice(signs)}3)"}
        for word, row in rows[:320]
    ]
    held_out_file = write_lines(tmp_path / "held_out.jsonl", held_out)
    sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=write_lines(tmp_path / "sft.jsonl", taught),
            num_steps=400,
            batch_tokens=1024,
            micro_batch_tokens=1024,
            max_length=64,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
            save_every=1000,
            dtype="float32",
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
                rewards=(RewardConfig(name="code", options={"timeout": 10.0}),),
                num_steps=24,
                prompts_per_step=12,
                group_size=8,
                sampling=Sampling(max_new_tokens=6),
                optimizer=OptimizerConfig(lr=3e-3),
                eval=Evaluation(tasks=held_out_file, every=1000, num_samples=4),
                save_every=1000,
                dtype="float32",
            ),
            name=name,
            runs_dir=tmp_path,
            resume=False,
        )
        lines = list(read_lines(run / "metrics.jsonl"))
        success[name] = lines[0]["eval/pass@1"], lines[-1]["eval/pass@1"]
        assert all(line.get("invalid_samples", 0) == 0 for line in lines)
        recorded = json.loads((run / "run.json").read_text())["config"]["rewards"]
        assert recorded[0]["options"] == {"timeout": 10.0}
    before, after = success["right"]
    assert 0.2 < before < 0.5
    assert after > 0.8
    assert success["shuffled"][0] == before
    assert success["shuffled"][1] <= before + 0.15
