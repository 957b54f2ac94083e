"""Online DPO: which of the sampled answers are compared."""

from __future__ import annotations

from typing import Any

import pytest

from strop.rewards.base import ScoredCompletion
from strop.rollouts.groups import Group
from strop.stages.dpo_config import Config, Online
from strop.stages.dpo_online import ranked
from strop.types import Completion, Task


def group(*rewards: float | None) -> Group:
    """Answers 10, 11, ... with these rewards; None is a verifier that broke."""
    completions = tuple(
        Completion(token_ids=(10 + place, 2), sampling_logprobs=(-1.0, -1.0), finish_reason="stop", text="x")
        for place in range(len(rewards))
    )
    scores = tuple(
        ScoredCompletion(reward=99.0 if reward is None else reward, parts={}, is_valid=reward is not None)
        for reward in rewards
    )
    return Group(task=Task(id="t:1", prompt="p"), prompt_ids=(5, 6), completions=completions, scores=scores)


def settings(**online: Any) -> Config:
    return Config(
        init_from="x",
        num_steps=1,
        rewards=({"name": "math"},),
        online=Online(tasks="t", **online),  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize(
    ("pairs", "rewards", "answers", "ranks"),
    [
        ("best_worst", (0.5, 1.0, 0.0), (11, 12), (0, 1)),
        ("best_worst", (None, 1.0, 0.0, 1.0), (11, 12), (0, 1)),
        ("all", (0.5, 1.0, 0.0), (11, 10, 12), (0, 1, 2)),
        ("all", (0.0, 1.0, None, 0.0, 1.0), (11, 14, 10, 13), (0, 0, 1, 1)),
    ],
)
def test_answers_are_ranked_by_reward(
    pairs: str, rewards: tuple[float | None, ...], answers: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    found = ranked(group(*rewards), settings(pairs=pairs))
    assert found is not None
    assert tuple(answer.token_ids[0] for answer in found.answers) == answers
    assert found.ranks == ranks and found.prompt_ids == (5, 6)


@pytest.mark.parametrize("rewards", [(1.0, 1.0, 1.0), (None, None), (None, 1.0)])
@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_nothing_to_compare_makes_no_comparison(pairs: str, rewards: tuple[float | None, ...]) -> None:
    assert ranked(group(*rewards), settings(pairs=pairs)) is None
