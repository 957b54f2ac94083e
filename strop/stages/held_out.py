"""Held-out evaluation while an RL stage trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strop.evals.tasks import evaluate_tasks
from strop.generation import Engine
from strop.rewards.base import WeightedRewards
from strop.rollouts.prompts import Sampling
from strop.tokenizer import Tokenizer
from strop.types import Task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out pass@1 (or a reward model's score) of the first reward: before the first step, while training, after."""

    tasks: str = ""
    """A source of tasks as `tasks`; empty = no evaluation."""
    every: int = 50
    """Steps between evaluations."""
    max_tasks: int = 200
    """Only the first so many."""
    num_samples: int = 1
    """Answers per task, at the training temperature."""


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    reward: WeightedRewards,
    *,
    sampling: Sampling,
    num_samples: int,
    seed: int,
) -> dict[str, float]:
    """Held-out figures of the first reward, as eval/NAME. With the same seed only the policy changes."""
    report = evaluate_tasks(
        engine,
        tokenizer,
        tasks,
        reward.first,
        sampling=sampling.params(tokenizer),
        num_samples=num_samples,
        seed=seed,
    )
    return {f"eval/{name}": value for name, value in report.metrics.items()}
