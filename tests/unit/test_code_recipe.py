"""The code recipe: its solutions are right, no task is in two files, a slip scores what it is worth."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from strop.rewards.code import CodeReward
from strop.types import Completion, Task

FOLDER = Path(__file__).parents[2] / "recipes" / "code"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("code_data", FOLDER / "data.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def data(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    recipe.write_code_data(folder)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def passes(program: str, tests: list[str]) -> bool:
    scope: dict[str, Any] = {}
    try:
        exec(program, scope)  # the recipe's own text, not a model's
        scope["candidate"] = scope["f"]
        exec("\n".join(tests), scope)
    except Exception:
        return False
    return True


def test_every_solution_passes_its_own_tests(data: Path):
    tasks = rows(data / "tasks.jsonl") + rows(data / "held_out.jsonl")
    assert len(tasks) == 520
    for row in tasks:
        assert passes(row["prompt"] + row["solution"], row["tests"]), row["prompt"]


def test_the_sandbox_agrees_and_a_slip_scores_nothing(recipe: ModuleType, data: Path, sandbox_works):
    rng = random.Random(0)
    chosen = rows(data / "held_out.jsonl")[:12]
    reward = CodeReward(num_workers=1)
    reward.check_tasks([task(row) for row in chosen])
    texts = [recipe.slip(row["solution"], rng) for row in chosen]
    verdicts = reward.score([task(row) for row in chosen], [answer(text) for text in texts])
    expected = [float(passes(row["prompt"] + text, row["tests"])) for row, text in zip(chosen, texts, strict=True)]
    assert [verdict.score for verdict in verdicts] == expected
    assert 0.0 in expected
    reward.close()


def task(row: dict[str, Any]) -> Task:
    return Task(id=row["prompt"], prompt=row["prompt"], columns=row)


def answer(text: str) -> Completion:
    return Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=text)


def test_no_task_is_in_two_files_and_the_control_mixes_tests_alone(data: Path):
    tasks, shuffled = rows(data / "tasks.jsonl"), rows(data / "tasks_shuffled.jsonl")
    taught = [row["prompt"] for row in rows(data / "sft.jsonl")]
    prompts = taught + [row["prompt"] for row in tasks + rows(data / "held_out.jsonl")]
    assert len(set(prompts)) == len(prompts) == 2520
    assert [row["prompt"] for row in tasks] == [row["prompt"] for row in shuffled]
    assert sorted(map(str, (row["tests"] for row in tasks))) == sorted(map(str, (row["tests"] for row in shuffled)))
    passed = sum(passes(row["prompt"] + row["solution"], row["tests"]) for row in shuffled)
    assert passed < 0.03 * len(tasks)
