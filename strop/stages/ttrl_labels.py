"""What the right answers, where there are some, say about a run without labels. Nothing here reaches the training."""

from __future__ import annotations

from collections.abc import Sequence

from strop.evals.tasks import judge_samples
from strop.rewards.math import MathReward
from strop.rewards.vote import count_votes
from strop.rollouts.groups import Group
from strop.stages.ttrl_config import Config
from strop.types import Completion, Task


class Labels:
    """The math reward with the column of right answers. Tasks without one are left out of every figure."""

    def __init__(self, config: Config, tasks: Sequence[Task]) -> None:
        """Raises ValueError naming the first task whose answer can never be right."""
        self._votes = config.votes
        self._known = {task.id: task for task in tasks if config.answer_column in task.columns}
        self._math: MathReward | None = None
        if self._known:
            self._math = MathReward(answer_column=config.answer_column, answer_pattern=config.answer_pattern)
            try:
                self._math.check_tasks(list(self._known.values()))
            except ValueError as error:
                self.close()
                raise ValueError(
                    f'{error}. The answers are only for the report: answer_column = "" leaves them unread'
                ) from None

    def held_out(self, tasks: Sequence[Task], groups: Sequence[Sequence[Completion]]) -> dict[str, float]:
        """eval/pass@1 and eval/maj@N with their 95 % intervals; nothing where no task has an answer."""
        pairs = [(self._known[task.id], group) for task, group in zip(tasks, groups, strict=True) if self._has(task)]
        if not pairs or self._math is None:
            return {}
        metrics = judge_samples([task for task, _ in pairs], [group for _, group in pairs], self._math).metrics
        return {f"eval/{name}": value for name, value in metrics.items() if name.startswith(("pass@", "maj@"))}

    def votes(self, groups: Sequence[Group]) -> dict[str, float]:
        """Of a step's votes: how often the majority was right (label_accuracy), how often the reward was what the right
        answer would have given (reward_accuracy), and how often a completion was right (labelled_pass@1).

        A vote can be wrong and the reward right: scattered wrong answers get the 0 that they deserve.
        """
        known = [group for group in groups if self._has(group.task)]
        if not known or self._math is None:
            return {}
        flat_tasks = [self._known[group.task.id] for group in known for _ in group.completions]
        verdicts = self._math.score(flat_tasks, [completion for group in known for completion in group.completions])
        is_right = iter([verdict.score >= 1.0 for verdict in verdicts])
        majorities, agreeing, answers = 0, 0, 0
        for group in known:
            right = [next(is_right) for _ in group.completions]
            elected = [score.reward >= 1.0 for score in group.scores] if self._votes else self._elected(group)
            majorities += any(won and good for won, good in zip(elected, right, strict=True))
            agreeing += sum(won == good for won, good in zip(elected, right, strict=True))
            answers += sum(right)
        metrics = {"label_accuracy": majorities / len(known), "labelled_pass@1": answers / len(flat_tasks)}
        return metrics | ({"reward_accuracy": agreeing / len(flat_tasks)} if self._votes else {})

    def _elected(self, group: Group) -> list[bool]:
        assert self._math is not None
        keys = [self._math.answer_key(completion) for completion in group.completions]
        winner = count_votes(keys).winner
        return [key is not None and key == winner for key in keys]

    def close(self) -> None:
        if self._math is not None:
            self._math.close()

    def _has(self, task: Task) -> bool:
        return task.id in self._known
