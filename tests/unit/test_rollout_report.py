"""Figures of a rollout."""

from __future__ import annotations

import pytest

from strop.rewards.base import ScoredCompletion
from strop.rollouts.groups import Group
from strop.rollouts.report import rollout_metrics
from strop.types import Completion, Task, Verdict


def test_disagreement_is_the_share_of_doubted_answers_with_another_second_opinion():
    verdicts = [
        Verdict(score=1.0, second_opinion=True),
        Verdict(score=1.0, second_opinion=False),
        Verdict(score=0.0, status="wrong", second_opinion=True),
        Verdict(score=0.0, status="wrong", second_opinion=False),
        Verdict(score=0.0, status="wrong", second_opinion=False),
        Verdict(score=0.0, status="unparsed"),
        Verdict(score=0.0, status="infra_error", second_opinion=True),
    ]
    completion = Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text="4")
    group = Group(
        task=Task(id="t:1", prompt="?"),
        prompt_ids=(1,),
        completions=(completion,) * len(verdicts),
        scores=tuple(
            ScoredCompletion(
                reward=verdict.score,
                parts={"math": verdict, "plain": Verdict(score=1.0)},
                is_valid=verdict.status != "infra_error",
            )
            for verdict in verdicts
        ),
    )
    metrics = rollout_metrics([group], ["math", "plain"])
    assert metrics["disagreement/math"] == pytest.approx(2 / 5)
    assert "disagreement/plain" not in metrics
