"""Tasks -> scored groups: the policy acts, the reward judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strop.generation import Engine
from strop.rewards.base import ScoredCompletion, WeightedRewards
from strop.runs.seeds import derive_seed
from strop.types import Completion, Request, SamplingParams, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All the answers to one task, with what they earned."""

    task: Task
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    scores: tuple[ScoredCompletion, ...]

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.scores]

    @property
    def is_flat(self) -> bool:
        """Whether every valid reward is the same, so that a group baseline leaves nothing to learn."""
        return len({score.reward for score in self.scores if score.is_valid}) <= 1


def roll_out(
    engine: Engine,
    reward: WeightedRewards,
    tasks_P: Sequence[Task],
    prompts_P: Sequence[tuple[int, ...]],
    *,
    group_size: int,
    sampling: SamplingParams,
    seed: int,
) -> list[Group]:
    """One group of group_size scored completions per task. The seed and the task's place alone decide the samples."""
    requests = [
        Request(prompt_ids=prompt, sampling=sampling, num_samples=group_size, seed=derive_seed(seed, index))
        for index, prompt in enumerate(prompts_P)
    ]
    completions_PG = engine.generate(requests)
    flat_tasks = [task for task in tasks_P for _ in range(group_size)]
    flat_scores = reward.score(flat_tasks, [completion for group in completions_PG for completion in group])
    return [
        Group(
            task=task,
            prompt_ids=prompt,
            completions=tuple(completions),
            scores=tuple(flat_scores[index * group_size : (index + 1) * group_size]),
        )
        for index, (task, prompt, completions) in enumerate(zip(tasks_P, prompts_P, completions_PG, strict=True))
    ]
