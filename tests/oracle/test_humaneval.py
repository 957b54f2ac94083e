"""HumanEval by its own solutions: all 164 pass, and none passes with the body gone."""

from __future__ import annotations

import pytest

from strop.data.tasks import tasks_from_rows
from strop.evals.suites import load_suite
from strop.rewards.code import CodeReward
from strop.types import Completion

pytestmark = pytest.mark.usefixtures("sandbox_works")


def answer(text: str) -> Completion:
    return Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text=text)


def test_every_canonical_solution_scores_one_and_every_stub_zero():
    tasks = tasks_from_rows(load_suite("humaneval").rows)
    assert len(tasks) == 164 and tasks[2].id == "HumanEval/2"
    reward = CodeReward(num_workers=2, timeout=20.0)
    try:
        right = reward.score(tasks, [answer(task.columns["solution"]) for task in tasks])
        assert [(task.id, v) for task, v in zip(tasks, right, strict=True) if v.score != 1.0] == []
        stubs = reward.score(tasks, [answer("    pass\n") for _ in tasks])
        assert {verdict.status for verdict in stubs} == {"wrong"}
    finally:
        reward.close()


def test_the_chat_form_accepts_the_same_solutions():
    tasks = tasks_from_rows(load_suite("humaneval-chat").rows)
    reward = CodeReward(num_workers=2, timeout=20.0)
    try:
        some = tasks[::20]
        verdicts = reward.score(some, [answer(task.columns["solution"]) for task in some])
        assert [verdict.status for verdict in verdicts] == ["ok"] * len(some)
        reward.check_tasks(some[:2])
    finally:
        reward.close()
