"""GRPO learns to write code that passes its tests, run in the sandbox; with the tests of other tasks it does not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rewards.sandbox import canary
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import grpo, sft
from strop.stages.grpo_config import Evaluation

pytestmark = pytest.mark.skipif(canary()[0].name == "sandbox", reason=f"no sandbox here: {canary()[0].detail}")

OPERATORS = {"add": "+", "subtract": "-", "multiply": "*"}


def write_lines(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task(word: str, number: int) -> dict[str, str]:
    sign = OPERATORS[word]
    tests = f"for a, b in ((5, 3), (-2, 7)): assert f(a, b) == a {sign} b"
    prompt = f"# {word} {number:02d}\ndef f(a, b): return a"
    return {"prompt": prompt, "tests": tests, "entry_point": "f", "solution": f" {sign} b"}


def test_learns_from_its_own_tests_and_not_from_those_of_other_tasks(tiny_folder: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [task(word, number) for word in OPERATORS for number in range(60)]
    draw.shuffle(rows)
    training, held_out = rows[:160], rows[160:]
    # The tests of a task drawn anew for each row, and no solution, which would give the fault away before training.
    mixed = [{**row, "tests": draw.choice(training)["tests"], "solution": ""} for row in training]
    mixed = [{name: value for name, value in row.items() if value} for row in mixed]
    taught = [
        {"prompt": row["prompt"], "completion": f" {draw.choice(list(OPERATORS.values()))} b"}
        for row in training
        for _ in range(4)
    ]
    held_out_file = write_lines(tmp_path / "held_out.jsonl", held_out)
    sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=write_lines(tmp_path / "sft.jsonl", taught),
            num_steps=200,
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
    for name, tasks in (("right", training), ("mixed", mixed)):
        run = grpo.train(
            grpo.Config(
                init_from="taught",
                tasks=write_lines(tmp_path / f"{name}.jsonl", tasks),
                rewards=(RewardConfig(name="code", options={"timeout": 10.0, "check_solutions": False}),),
                num_steps=24,
                prompts_per_step=6,
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
        assert recorded[0]["options"] == {"timeout": 10.0, "check_solutions": False}
    before, after = success["right"]
    assert 0.2 < before < 0.5
    assert after > 0.8
    assert success["mixed"][0] == before
    assert success["mixed"][1] <= before + 0.15
