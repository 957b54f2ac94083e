"""Tasks -> scored groups: the policy acts, the reward judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strop.generation import Engine
from strop.models.recording import Recording
from strop.rewards.base import ScoredCompletion, WeightedRewards
from strop.rewards.overlap import JudgingTime, Scoring
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
    recording: Recording | None = None,
) -> tuple[list[Group], JudgingTime]:
    """One group of group_size scored completions per task, and how long their verdicts were waited for.

    The seed and the task's place alone decide the samples. A completion is judged as soon as it ends, while others are
    still being generated.
    """
    requests = [
        Request(prompt_ids=prompt, sampling=sampling, num_samples=group_size, seed=derive_seed(seed, index))
        for index, prompt in enumerate(prompts_P)
    ]
    with Scoring(reward) as scoring:
        completions_PG = engine.generate(
            requests,
            on_finished=lambda request, sample, completion: scoring.add(
                request * group_size + sample, tasks_P[request], completion
            ),
            recording=recording,
        )
        flat_scores = scoring.finish()
    groups = [
        Group(
            task=task,
            prompt_ids=prompt,
            completions=tuple(completions),
            scores=tuple(flat_scores[index * group_size : (index + 1) * group_size]),
        )
        for index, (task, prompt, completions) in enumerate(zip(tasks_P, prompts_P, completions_PG, strict=True))
    ]
    return groups, scoring.time
